"""The soak: hours of mixed requests with injected faults against Cog's real server; `script/soak` runs it."""
