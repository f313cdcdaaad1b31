"""Text -> LoraReference -> Source -> a file in the cache."""
