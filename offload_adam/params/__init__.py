"""What is optimized: parameters, their groups and buckets."""
