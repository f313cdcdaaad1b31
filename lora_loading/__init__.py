"""LoRAs: what a text names, where its file lies, what the file holds, and how it joins the transformer."""
