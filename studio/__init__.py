"""A page over any Cog server of this predictor: `script/studio`. Imports nothing of the project outside this folder."""
