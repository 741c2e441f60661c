"""Row tiles of 16 query rows on mma.sync; schedule.py has the schedule."""
