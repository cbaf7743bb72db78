"""Pages for a browser: a report about runs, and an app to try a model. Neither asks anything of another machine."""
