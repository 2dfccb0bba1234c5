"""Programs that other interpreters run, given a folder: they read `job.json` there and write `answer.json` (see `apart`)."""
