"""The whole product in a few minutes: pairs, hints, training, measuring, a report."""
