"""Picture bytes: formats, downloads, where they stay, how they are shown."""
