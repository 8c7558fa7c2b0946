"""Pure arithmetic: where every element of every parameter lies, for any rank of any world."""
