//! Websockets of exec and console: each operation offers some by name (`0`, `1`, `2`, `control`), each under a secret of
//! its own; the client connects them at `/1.0/operations/ID/websocket?secret=…`. Secrets live here only, never in records.
//! A viewer of SPICE connects one for each of its channels, all under the same secret; any other slot is taken once.

use crate::socket::Socket;
use karst_model::{Error, OperationId, Result};
use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard},
    time::Duration,
};
use tokio::sync::{mpsc, oneshot};

/// How long a client may take to connect what it was offered.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Sockets under one secret that were connected and not yet taken.
const WAITING: usize = 16;

/// Slots that wait for their client.
#[derive(Debug, Default)]
pub struct Sessions(Mutex<HashMap<OperationId, Offered>>);

#[derive(Debug)]
struct Offered {
    slots: Vec<Slot>,
    /// Why nothing is behind them any more: told to those who come late.
    ended: Option<Error>,
}

#[derive(Debug)]
struct Slot {
    name: &'static str,
    secret: String,
    give: Give,
}

#[derive(Debug)]
enum Give {
    /// Taken by the first who knows the secret.
    Once(Option<oneshot::Sender<Socket>>),
    /// Taken by each who knows it.
    Each(mpsc::Sender<Socket>),
}

/// Where a websocket that a client has connected goes.
#[derive(Debug)]
pub enum Taker {
    /// To who awaits this one.
    One(oneshot::Sender<Socket>),
    /// To who awaits any number.
    Any(mpsc::Sender<Socket>),
}

impl Taker {
    /// Hands it over. It closes when whoever awaited it has gone, or does not keep up.
    pub fn give(self, socket: Socket) {
        // What is not taken comes back and is closed by that.
        match self {
            Self::One(one) => drop(one.send(socket)),
            Self::Any(any) => drop(any.try_send(socket)),
        }
    }
}

/// What is awaited: by name, in the order asked for.
pub type Awaited = Vec<oneshot::Receiver<Socket>>;

fn secret() -> String {
    // Two random UUIDs: 244 bits of the system's randomness.
    format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple())
}

impl Sessions {
    fn slots(&self) -> MutexGuard<'_, HashMap<OperationId, Offered>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Offers sockets of these names; answers the secrets by name, and the sockets to come.
    pub fn offer(
        &self,
        operation: OperationId,
        names: &[&'static str],
    ) -> (serde_json::Map<String, serde_json::Value>, Awaited) {
        let mut secrets = serde_json::Map::new();
        let mut awaited = vec![];
        let mut slots = vec![];
        for name in names {
            let (give, take) = oneshot::channel();
            let secret = secret();
            secrets.insert((*name).to_owned(), secret.clone().into());
            slots.push(Slot { name, secret, give: Give::Once(Some(give)) });
            awaited.push(take);
        }
        self.slots().insert(operation, Offered { slots, ended: None });
        (secrets, awaited)
    }

    /// Offers one socket `control`, and any number of `0` under one secret; answers the secrets by name, and the sockets to come.
    pub fn offer_many(
        &self,
        operation: OperationId,
    ) -> (serde_json::Map<String, serde_json::Value>, oneshot::Receiver<Socket>, mpsc::Receiver<Socket>) {
        let (control, controlled) = oneshot::channel();
        let (each, all) = mpsc::channel(WAITING);
        let gives = [("control", Give::Once(Some(control))), ("0", Give::Each(each))];
        let slots: Vec<_> = gives.map(|(name, give)| Slot { name, secret: secret(), give }).into();
        let secrets = slots.iter().map(|s| (s.name.to_owned(), s.secret.clone().into())).collect();
        self.slots().insert(operation, Offered { slots, ended: None });
        (secrets, controlled, all)
    }

    /// Forgets what was offered.
    pub fn withdraw(&self, operation: OperationId) {
        self.slots().remove(&operation);
    }

    /// Nothing is behind what was offered, because of `why`: whoever knows a secret is told, until [`Sessions::withdraw`].
    pub fn fail(&self, operation: OperationId, why: &Error) {
        if let Some(offered) = self.slots().get_mut(&operation) {
            offered.ended = Some(why.clone());
        }
    }

    /// The slot behind a secret; it can be taken once, if it is not for many.
    ///
    /// # Errors
    /// Forbidden, without telling whether the operation or the secret is wrong; why it failed, where it did.
    pub fn take(&self, operation: OperationId, secret: &str) -> Result<Taker> {
        let wrong = || Error::forbidden("no websocket is awaited under this operation and secret");
        let mut slots = self.slots();
        let offered = slots.get_mut(&operation).ok_or_else(wrong)?;
        let known = |s: &&mut Slot| same(s.secret.as_bytes(), secret.as_bytes());
        let slot = offered.slots.iter_mut().find(known).ok_or_else(wrong)?;
        if let Some(why) = &offered.ended {
            return Err(why.clone());
        }
        match &mut slot.give {
            Give::Each(any) => Ok(Taker::Any(any.clone())),
            Give::Once(one) => one.take().map(Taker::One).ok_or_else(|| {
                Error::conflict(format!("the websocket {:?} is connected already", slot.name))
            }),
        }
    }
}

/// Compares in a time that does not depend on where they differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |d, (x, y)| d | (x ^ y)) == 0
}

/// Waits for all sockets.
///
/// # Errors
/// Timeout.
pub async fn all(awaited: Awaited) -> Result<Vec<Socket>> {
    let late = || Error::timeout("the client did not connect the websockets it was offered");
    tokio::time::timeout(PATIENCE, futures::future::try_join_all(awaited))
        .await
        .map_err(|_| late())?
        .map_err(|_| late())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_opens_its_own_slot_once() {
        let sessions = Sessions::default();
        let (a, b) = (OperationId(uuid::Uuid::from_u128(1)), OperationId(uuid::Uuid::from_u128(2)));
        let (secrets, _awaited) = sessions.offer(a, &["0", "control"]);
        let zero = secrets["0"].as_str().unwrap();
        assert_eq!(zero.len(), 64);
        assert_ne!(zero, secrets["control"].as_str().unwrap());
        assert!(sessions.take(a, "").is_err());
        assert!(sessions.take(b, zero).is_err());
        sessions.take(a, zero).unwrap();
        assert!(sessions.take(a, zero).unwrap_err().is(karst_model::ErrorKind::Conflict));
        let other = secrets["control"].as_str().unwrap();
        sessions.fail(a, &Error::unavailable("the guest does not answer"));
        assert!(sessions.take(a, other).unwrap_err().is(karst_model::ErrorKind::Unavailable));
        assert!(sessions.take(a, "").unwrap_err().is(karst_model::ErrorKind::Forbidden));
        sessions.withdraw(a);
        assert!(sessions.take(a, secrets["control"].as_str().unwrap()).is_err());
    }

    #[test]
    fn a_secret_for_many_opens_again_until_it_is_withdrawn() {
        let sessions = Sessions::default();
        let a = OperationId(uuid::Uuid::from_u128(1));
        let (secrets, _control, mut all) = sessions.offer_many(a);
        assert_eq!(secrets.len(), 2);
        let zero = secrets["0"].as_str().unwrap();
        for _ in 0..3 {
            assert!(matches!(sessions.take(a, zero).unwrap(), Taker::Any(_)));
        }
        let control = secrets["control"].as_str().unwrap();
        assert!(matches!(sessions.take(a, control).unwrap(), Taker::One(_)));
        assert!(sessions.take(a, control).unwrap_err().is(karst_model::ErrorKind::Conflict));
        sessions.withdraw(a);
        assert!(sessions.take(a, zero).is_err());
        assert!(matches!(all.try_recv(), Err(mpsc::error::TryRecvError::Disconnected)));
    }
}
