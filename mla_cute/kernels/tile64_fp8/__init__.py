"""Row tiles over FP8 caches: 64 query rows on wgmma; schedule.py has the schedule."""
