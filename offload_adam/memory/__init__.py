"""Who owns which host bytes: the arena, and the state planes that are cut from it."""
