"""Where projections come from: models, the tap, the watch, the axis build. The only place that imports torch."""
