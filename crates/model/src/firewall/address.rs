//! Ranges of addresses.

use crate::{Error, Result};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::{fmt, net::IpAddr, str::FromStr};

/// First and last address of a range, of one IP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AddressRange {
    first: IpAddr,
    last: IpAddr,
}

impl AddressRange {
    /// `None` when the ends are of different versions or in the wrong order.
    pub fn new(first: IpAddr, last: IpAddr) -> Option<Self> {
        (first.is_ipv4() == last.is_ipv4() && first <= last).then_some(Self { first, last })
    }
    /// First address.
    pub fn first(&self) -> IpAddr {
        self.first
    }
    /// Last address.
    pub fn last(&self) -> IpAddr {
        self.last
    }
    /// Of IPv4 addresses.
    pub fn is_v4(&self) -> bool {
        self.first.is_ipv4()
    }
    /// Is it in there?
    pub fn contains(&self, address: IpAddr) -> bool {
        self.is_v4() == address.is_ipv4() && (self.first..=self.last).contains(&address)
    }
}

impl From<IpNet> for AddressRange {
    fn from(net: IpNet) -> Self {
        Self { first: net.network(), last: net.broadcast() }
    }
}

impl From<IpAddr> for AddressRange {
    fn from(address: IpAddr) -> Self {
        Self { first: address, last: address }
    }
}

impl FromStr for AddressRange {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let wrong = || {
            Error::invalid(
                "address",
                format!("{s:?} is not an address, subnet or range FIRST-LAST of addresses"),
            )
        };
        if let Some((a, b)) = s.split_once('-') {
            let (a, b) = (a.trim().parse().map_err(|_| wrong())?, b.trim().parse().map_err(|_| wrong())?);
            return Self::new(a, b).ok_or_else(wrong);
        }
        if s.contains('/') {
            return Ok(s.parse::<IpNet>().map_err(|_| wrong())?.into());
        }
        Ok(s.parse::<IpAddr>().map_err(|_| wrong())?.into())
    }
}

impl TryFrom<String> for AddressRange {
    type Error = Error;
    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

impl From<AddressRange> for String {
    fn from(r: AddressRange) -> Self {
        r.to_string()
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { self.first.fmt(f) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

fn after(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(a) => u32::from(a).checked_add(1).map(|n| IpAddr::V4(n.into())),
        IpAddr::V6(a) => u128::from(a).checked_add(1).map(|n| IpAddr::V6(n.into())),
    }
}

/// The same addresses as sorted ranges that neither overlap nor touch, as a set of the kernel wants them.
pub fn merge(ranges: impl IntoIterator<Item = AddressRange>) -> Vec<AddressRange> {
    let mut all: Vec<AddressRange> = ranges.into_iter().collect();
    all.sort();
    let mut merged: Vec<AddressRange> = vec![];
    for range in all {
        match merged.last_mut() {
            Some(before)
                if before.is_v4() == range.is_v4()
                    && after(before.last).is_none_or(|next| range.first <= next) =>
            {
                before.last = before.last.max(range.last);
            }
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merged() {
        let parse = |list: &[&str]| merge(list.iter().map(|s| s.parse().unwrap()));
        let text = |list: &[&str]| parse(list).iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        assert_eq!(
            text(&["10.0.0.5", "10.0.0.0/30", "10.0.0.4", "fd42::/127"]),
            "10.0.0.0-10.0.0.5 fd42::-fd42::1"
        );
        assert_eq!(text(&["0.0.0.0/0", "10.0.0.0/8", "255.255.255.255"]), "0.0.0.0-255.255.255.255");
        for bad in ["", "10.0.0", "10.0.0.1-", "10.0.0.1-fd42::1", "::/129", "10.0.0.1 }"] {
            assert!(bad.parse::<AddressRange>().is_err(), "{bad}");
        }
    }
}
