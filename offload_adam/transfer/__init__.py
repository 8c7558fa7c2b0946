"""Who may touch which bytes and when: collectives, their slots, copies to a device."""
