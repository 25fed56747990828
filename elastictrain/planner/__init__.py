"""Where a job should run, and how: profiles of devices and links, a cost model, and searches exact under it."""
