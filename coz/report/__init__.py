"""One HTML page about some runs, made of their files alone: `python -m coz.report RUN…`."""
