"""What a run says of itself: heartbeats, status, metrics, submitted jobs."""
