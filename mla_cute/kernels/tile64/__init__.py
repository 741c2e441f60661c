"""Row tiles over 16-bit caches: 64 query rows on wgmma; schedule.py has the schedule."""
