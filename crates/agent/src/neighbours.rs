//! Neighbours of the host, by their MAC addresses, and how often a machine tells of its memory.

use crate::GuestRef;
use karst_model::{Error, Result};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// Neighbours to be found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NeighboursFind {
    /// Their MAC addresses.
    pub macs: Vec<String>,
}

impl NeighboursFind {
    /// Most of them.
    pub const MOST: usize = 64;

    /// Can it be meant?
    ///
    /// # Errors
    /// Invalid.
    pub fn check(&self) -> Result<()> {
        if self.macs.len() > Self::MOST {
            return Err(Error::invalid("macs", format!("at most {} neighbours at a time", Self::MOST)));
        }
        let good = |mac: &String| {
            let parts: Vec<&str> = mac.split(':').collect();
            parts.len() == 6 && parts.iter().all(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))
        };
        match self.macs.iter().find(|mac| !good(mac)) {
            None => Ok(()),
            Some(mac) => Err(Error::invalid("macs", format!("{mac:?} is no MAC address"))),
        }
    }
}

/// An address that the host has spoken to lately, or that has spoken to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// Whose, in lower case.
    pub mac: String,
    /// Which.
    pub address: IpAddr,
}

/// How often a machine is to tell of its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPeriod {
    /// Which.
    pub guest: GuestRef,
    /// Every so many seconds; 0: not at all.
    pub seconds: u32,
}

impl MemoryPeriod {
    /// The longest.
    pub const LONGEST: u32 = 86_400;

    /// Can it be meant?
    ///
    /// # Errors
    /// Invalid.
    pub fn check(&self) -> Result<()> {
        match self.seconds <= Self::LONGEST {
            true => Ok(()),
            false => Err(Error::invalid("period", format!("at most {} seconds", Self::LONGEST))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_named_by_addresses() {
        let find = |macs: &[&str]| NeighboursFind { macs: macs.iter().map(|m| (*m).to_owned()).collect() };
        find(&["52:54:00:aa:BB:0c"]).check().unwrap();
        for bad in ["", "52:54:00:aa:bb", "52:54:00:aa:bb:0c:1", "52-54-00-aa-bb-0c", "5g:54:00:aa:bb:0c"] {
            assert!(find(&[bad]).check().is_err(), "{bad}");
        }
        assert!(find(&["52:54:00:aa:bb:0c"; NeighboursFind::MOST + 1]).check().is_err());
    }
}
