"""Pure arithmetic on ints: how many bytes each rank stores and sends, and in which order.

flat          buckets, and the elements of each parameter that a rank owns; start here
state_plan    StatePlan: location and formats of a bucket's state
schedule      the tasks of a step, their lanes and their waits
budget        bytes that a plan stores and moves; the number of slots
timeline      start and end of each task of a schedule, from its duration
ring          bytes that ranks send in a collective, and the speed
"""
