//! What connections from the network may cost: handshakes, connections of those who are known by their certificates, and of
//! those who are not (yet): a token comes with a request only. Each has its own bound, and one client or address has a part
//! of it, so that nobody takes the places of others. A place is kept as long as its connection lasts, also after that was
//! upgraded to a websocket.

use karst_model::PrincipalId;
use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How many there may be at once.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Handshakes; more wait in the listener's queue.
    pub handshakes: usize,
    /// Connections of those who are known.
    pub connections: usize,
    /// Of these, of one client.
    pub of_one: usize,
    /// Connections of those who are not.
    pub strangers: usize,
    /// Handshakes from one address, and as many connections of those who are not known: who is comes in beside them.
    pub of_address: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { handshakes: 256, connections: 2048, of_one: 512, strangers: 512, of_address: 128 }
    }
}

/// So many of each.
#[derive(Debug)]
struct Shares<K> {
    most: usize,
    taken: Mutex<HashMap<K, usize>>,
}

impl<K: Eq + Hash + Clone> Shares<K> {
    fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, taken: Mutex::default() })
    }

    fn take(self: &Arc<Self>, of: K) -> Option<Share<K>> {
        let mut taken = self.taken.lock().unwrap_or_else(|e| e.into_inner());
        let count = taken.entry(of.clone()).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        drop(taken);
        Some(Share { of, shares: self.clone() })
    }
}

/// One of them, as long as it is kept.
#[derive(Debug)]
struct Share<K: Eq + Hash> {
    of: K,
    shares: Arc<Shares<K>>,
}

impl<K: Eq + Hash> Drop for Share<K> {
    fn drop(&mut self) {
        let mut taken = self.shares.taken.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(count) = taken.get_mut(&self.of) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.of);
            }
        }
    }
}

/// The places of all listeners of the API on the network.
#[derive(Debug)]
pub struct Places {
    handshakes: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
    of_one: Arc<Shares<PrincipalId>>,
    /// Handshakes from an address.
    arriving: Arc<Shares<IpAddr>>,
    /// Strangers from an address.
    of_address: Arc<Shares<IpAddr>>,
}

impl Places {
    /// All of them free.
    pub fn new(bounds: Bounds) -> Self {
        let semaphore = |most: usize| Arc::new(Semaphore::new(most));
        Self {
            handshakes: semaphore(bounds.handshakes),
            connections: semaphore(bounds.connections),
            strangers: semaphore(bounds.strangers),
            of_one: Shares::new(bounds.of_one),
            arriving: Shares::new(bounds.of_address),
            of_address: Shares::new(bounds.of_address),
        }
    }

    /// The places of handshakes, for a listener to wait for.
    pub fn handshakes(&self) -> Arc<Semaphore> {
        self.handshakes.clone()
    }

    /// Somebody comes from there; `None` when too many have.
    pub fn arrive(&self, handshake: OwnedSemaphorePermit, from: IpAddr) -> Option<Arrival> {
        let address = network_of(from);
        let share = self.arriving.take(address)?;
        Some(Arrival { _handshake: handshake, _share: share, address })
    }

    /// After the handshake: the place of a connection, of somebody or of nobody yet. `None` when there are too many.
    pub fn admit(&self, arrival: Arrival, who: Option<PrincipalId>) -> Option<Place> {
        let (of, places) = match who {
            Some(who) => (Of::Client { _share: self.of_one.take(who)? }, &self.connections),
            None => (Of::Address { _share: self.of_address.take(arrival.address)? }, &self.strangers),
        };
        Some(Place { _of: of, _connection: places.clone().try_acquire_owned().ok()? })
    }
}

/// Who shakes hands.
#[derive(Debug)]
pub struct Arrival {
    _handshake: OwnedSemaphorePermit,
    _share: Share<IpAddr>,
    address: IpAddr,
}

/// A connection that was let in, as long as it lasts.
#[derive(Debug)]
pub struct Place {
    _of: Of,
    _connection: OwnedSemaphorePermit,
}

#[derive(Debug)]
enum Of {
    Client { _share: Share<PrincipalId> },
    Address { _share: Share<IpAddr> },
}

/// What of an address is one's own: of IPv6 a host has a whole /64.
fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn arrive(places: &Places, from: &str) -> Option<Arrival> {
        places.arrive(places.handshakes().acquire_owned().await.unwrap(), from.parse().unwrap())
    }

    #[tokio::test]
    async fn strangers_take_nobodys_place() {
        let bounds = Bounds { handshakes: 8, connections: 3, of_one: 2, strangers: 3, of_address: 2 };
        let places = Places::new(bounds);
        let mut kept = vec![];
        for from in ["192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1"] {
            kept.push(places.admit(arrive(&places, from).await.unwrap(), None).unwrap());
        }
        let third = arrive(&places, "192.0.2.1").await.unwrap();
        assert!(places.admit(third, None).is_none(), "two of one address");
        let fourth = arrive(&places, "2001:db8::2:3").await.unwrap();
        let fifth = arrive(&places, "2001:db8::4").await.unwrap();
        assert!(arrive(&places, "2001:db8::5").await.is_none(), "which is a whole network of IPv6");
        drop(fifth);
        assert!(places.admit(fourth, None).is_none(), "three strangers");
        // Who is known has his own, also where strangers have come from before.
        let one = PrincipalId(uuid::Uuid::from_u128(1));
        let other = PrincipalId(uuid::Uuid::from_u128(2));
        for who in [one, one, other] {
            let arrival = arrive(&places, "192.0.2.1").await.unwrap();
            kept.push(places.admit(arrival, Some(who)).unwrap());
        }
        for who in [one, other] {
            let arrival = arrive(&places, "198.51.100.1").await.unwrap();
            assert!(places.admit(arrival, Some(who)).is_none(), "{who}");
        }
        // What ends is free again, and nothing of it is left.
        kept.clear();
        assert!(places.of_one.taken.lock().unwrap().is_empty());
        assert!(places.of_address.taken.lock().unwrap().is_empty());
        assert!(places.arriving.taken.lock().unwrap().is_empty());
        let all = (&places.handshakes, &places.connections, &places.strangers);
        assert_eq!(
            (all.0.available_permits(), all.1.available_permits(), all.2.available_permits()),
            (8, 3, 3)
        );
    }
}
