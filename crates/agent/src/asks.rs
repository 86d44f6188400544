//! What a running guest is asked to do by itself. Nobody waits for it: it may take its time, or not heed it.

use crate::GuestRef;
use karst_model::guest::{AskedBy, GuestWish};
use serde::{Deserialize, Serialize};

/// A guest that is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestAsk {
    /// Which.
    pub guest: GuestRef,
    /// For what.
    pub wish: GuestWish,
    /// How.
    pub by: AskedBy,
}
