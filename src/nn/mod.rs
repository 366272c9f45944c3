//! Layers for candle.
