"""One study of a lineup: its folder, its jobs, its cells, what they cost."""
