"""Image bytes: formats, download, files on this machine, remote storage."""
