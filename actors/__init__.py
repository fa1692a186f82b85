"""Ray actor roles: one plain class per file, made remote only by cluster.launch."""
