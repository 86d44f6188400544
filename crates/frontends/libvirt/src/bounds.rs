//! What clients may cost: connections, the memory of what they send, streams. Of one client, by who it is, and of one
//! connection. Whoever may connect to the read-only socket is anybody on the machine, so its bounds are the narrow ones.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::sync::Semaphore;

/// Frames up to this size are read without asking: so much each connection has anyway.
pub const SMALL: usize = 64 << 10;
/// Most bytes of a frame of a stream; libvirt's clients send a quarter of it.
pub const STREAM_FRAME: usize = 1 << 20;

/// All bounds of the front end.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// A client that does not read what it asked for is cut off after this; what is uploaded and not taken for so long is lost.
    pub patience: Duration,
    /// Time for the first frame of a connection.
    pub first: Duration,
    /// Streams of a connection.
    pub streams: usize,
    /// Bytes that wait in the streams of a connection: in its uploads, and as many in those into guests.
    pub stream_bytes: usize,
    /// Clients of `libvirt-sock`, by user.
    pub full: OfOne,
    /// Clients of `libvirt-sock-ro`, by user.
    pub read_only: OfOne,
    /// Clients over TLS, by principal.
    pub network: OfOne,
}

/// What one client may have, over all its connections.
#[derive(Debug, Clone, Copy)]
pub struct OfOne {
    /// Connections.
    pub connections: usize,
    /// Bytes of a frame.
    pub frame: usize,
    /// Bytes of all frames that are larger than [`SMALL`] and are being read or worked on.
    pub large: usize,
    /// Streams.
    pub streams: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        let frame = crate::frame::FRAME_MAX;
        Self {
            patience: Duration::from_secs(60),
            first: Duration::from_secs(30),
            streams: 32,
            stream_bytes: 8 << 20,
            full: OfOne { connections: 5000, frame, large: 1 << 30, streams: 4096 },
            // Statistics of as many domains as a call may name take 2 MiB.
            read_only: OfOne { connections: 64, frame: 4 << 20, large: 16 << 20, streams: 64 },
            network: OfOne { connections: 256, frame, large: 64 << 20, streams: 128 },
        }
    }
}

/// What a client may have of memory and streams; its connections share it.
#[derive(Debug, Clone)]
pub struct Allowance {
    /// Bytes of a frame.
    pub frame: usize,
    /// Bytes of large frames that are left.
    pub large: Arc<Semaphore>,
    /// Streams that are left.
    pub streams: Arc<Semaphore>,
    /// Streams, those that are there included.
    pub all_streams: usize,
}

/// Clients that are connected, by who they are.
#[derive(Debug)]
pub struct Clients<K> {
    bounds: OfOne,
    each: Mutex<HashMap<K, (usize, Allowance)>>,
}

impl<K: Clone + Eq + Hash> Clients<K> {
    /// Nobody yet.
    pub fn new(bounds: OfOne) -> Arc<Self> {
        Arc::new(Self { bounds, each: Mutex::default() })
    }

    /// A connection of `who`; none when they have as many as they may.
    pub fn admit(self: &Arc<Self>, who: K) -> Option<Place<K>> {
        let mut each = self.each.lock().unwrap_or_else(|e| e.into_inner());
        let (count, allowance) = each.entry(who.clone()).or_insert_with(|| {
            let OfOne { frame, large, streams, .. } = self.bounds;
            // A frame that may come must fit.
            let large = Arc::new(Semaphore::new(large.max(frame)));
            (0, Allowance { frame, large, streams: Arc::new(Semaphore::new(streams)), all_streams: streams })
        });
        if *count >= self.bounds.connections {
            return None;
        }
        *count += 1;
        Some(Place { allowance: allowance.clone(), clients: self.clone(), who })
    }
}

/// The place of a connection, as long as it lasts.
#[derive(Debug)]
pub struct Place<K: Clone + Eq + Hash> {
    /// What its client may have.
    pub allowance: Allowance,
    clients: Arc<Clients<K>>,
    who: K,
}

impl<K: Clone + Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut each = self.clients.each.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((count, _)) = each.get_mut(&self.who) {
            *count -= 1;
            if *count == 0 {
                each.remove(&self.who);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_client_takes_no_place_of_another() {
        let clients = Clients::new(OfOne { connections: 2, frame: 10, large: 5, streams: 3 });
        let (one, two) = (clients.admit(1000).unwrap(), clients.admit(1000).unwrap());
        assert!(clients.admit(1000).is_none());
        let other = clients.admit(1001).unwrap();
        // Their connections share what they have; others do not.
        let _stream = one.allowance.streams.clone().try_acquire_owned().unwrap();
        assert_eq!(
            (two.allowance.streams.available_permits(), other.allowance.streams.available_permits()),
            (2, 3)
        );
        assert_eq!(one.allowance.large.available_permits(), 10);
        drop(one);
        let again = clients.admit(1000).unwrap();
        drop((two, again, other));
        assert!(clients.each.lock().unwrap().is_empty());
    }
}
