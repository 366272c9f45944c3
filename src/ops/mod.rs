//! Operations on candle tensors.
