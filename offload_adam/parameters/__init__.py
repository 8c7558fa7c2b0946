"""The model's side: checks, flat device buckets, the version watch, groups, gradient hooks."""
