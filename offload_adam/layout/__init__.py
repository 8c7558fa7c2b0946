"""Pure arithmetic on ints: what every rank of a world stores, does and sends.

flat          buckets, and which elements of which parameter each rank owns; start here
state_plan    StatePlan: where and in which formats a bucket's state is stored
schedule      the tasks of a step, their lanes and what they wait for
budget        bytes that a plan stores and moves; the number of slots
timeline      when each task of a schedule runs, from how long each takes
ring          what ranks send in a collective, and how fast
"""
