"""Who may touch which bytes and when: collectives, the slots they run in, and copies to a device."""
