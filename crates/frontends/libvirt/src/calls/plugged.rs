//! Events of node devices: what was plugged, pulled out, or is another than before. The host is looked at again every two
//! seconds for as long as somebody listens, once for all connections, and at no other time.

use super::{Answered, int, nothing};
use crate::{
    Front,
    error::{Code, Part, VirError},
    frame::{Frame, Header},
    session::{Call, Session},
    xdr::{Reader, Writer},
    xml::nodedev,
};
use karst_engine::{Context, health::resources::HostResources};
use karst_model::access::{Permission, Principal};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, Weak},
    time::Duration,
};
use tokio::{
    sync::broadcast::{self, error::RecvError},
    task::AbortHandle,
};

/// Between two looks.
const LOOK: Duration = Duration::from_secs(2);
/// Looks that a slow listener has not heard of yet; it misses older ones.
const ROUNDS: usize = 16;
/// Callbacks of one connection.
const MOST: usize = 64;
/// `VIR_NODE_DEVICE_EVENT_ID_LIFECYCLE`, `_UPDATE`.
const LIFECYCLE: i32 = 0;
const UPDATE: i32 = 1;

/// Devices by name, with what is said of them.
type Known = BTreeMap<String, String>;

/// What a look found changed, by what of it one may see.
struct Round {
    all: Vec<(String, Change)>,
    /// Without serial numbers and hardware addresses.
    open: Vec<(String, Change)>,
}

/// The looks at the host's devices that all connections share.
pub struct Looks {
    rounds: broadcast::Sender<Arc<Round>>,
    /// Somebody looks.
    running: Mutex<bool>,
}

impl Default for Looks {
    fn default() -> Self {
        Self { rounds: broadcast::channel(ROUNDS).0, running: Mutex::default() }
    }
}

impl Looks {
    fn running(&self) -> MutexGuard<'_, bool> {
        self.running.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Who listens on a connection.
#[derive(Default)]
pub struct Watchers {
    /// By number: the kind of event, and the one device that it is about.
    all: BTreeMap<i32, (i32, Option<String>)>,
    last: i32,
    task: Option<AbortHandle>,
}

impl Watchers {
    /// Ends all.
    pub fn clear(&mut self) {
        self.all.clear();
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

fn watchers(session: &Session) -> MutexGuard<'_, Watchers> {
    session.plugged.lock().unwrap_or_else(|e| e.into_inner())
}

/// What one may see of the host's devices.
fn known(host: &HostResources, secrets: bool) -> Known {
    nodedev::devices(host, secrets).into_iter().map(|d| (d.name.clone(), d.document())).collect()
}

fn sees_secrets(session: &Session) -> bool {
    session.context.principal().may(Permission::ServerInspect, None)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Created,
    Deleted,
    Updated,
}

/// What became of devices between two looks, by name; what is gone first, since another may be where it was.
fn changes(before: &Known, now: &Known) -> Vec<(String, Change)> {
    let gone = before.keys().filter(|name| !now.contains_key(*name));
    let mut all: Vec<_> = gone.map(|name| (name.clone(), Change::Deleted)).collect();
    all.extend(now.iter().filter_map(|(name, document)| {
        let change = match before.get(name) {
            None => Change::Created,
            Some(old) if old != document => Change::Updated,
            Some(_) => return None,
        };
        Some((name.clone(), change))
    }));
    all
}

/// Looks until nobody listens any more.
async fn look(of: Weak<Front>, host: HostResources) {
    let views = |host: &HostResources| [true, false].map(|secrets| known(host, secrets));
    let mut before = views(&host);
    let context = Context::new(Principal::system());
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(front) = of.upgrade() else { return };
        {
            // Whoever begins to listen from here on finds that nobody looks.
            let mut running = front.looks.running();
            if front.looks.rounds.receiver_count() == 0 {
                *running = false;
                return;
            }
        }
        match front.engine.host_resources(&context).await {
            Ok(host) => {
                let now = views(&host);
                let [all, open] = [0, 1].map(|n| changes(&before[n], &now[n]));
                if !all.is_empty() {
                    // They may all have gone meanwhile.
                    let _ = front.looks.rounds.send(Arc::new(Round { all, open }));
                }
                before = now;
            }
            Err(e) => tracing::debug!(error = %e, "the host does not say what devices it has; asking again"),
        }
    }
}

/// Tells a connection what was found.
async fn listen(of: Weak<Session>, mut rounds: broadcast::Receiver<Arc<Round>>) {
    loop {
        let round = match rounds.recv().await {
            Ok(round) => round,
            Err(RecvError::Lagged(_)) => continue,
            Err(RecvError::Closed) => return,
        };
        // The connection owns this task, which must not keep it.
        let Some(session) = of.upgrade() else { return };
        let found = if sees_secrets(&session) { &round.all } else { &round.open };
        for (name, change) in found {
            tell(&session, name, *change).await;
        }
    }
}

async fn tell(session: &Session, name: &str, change: Change) {
    let kind = if change == Change::Updated { UPDATE } else { LIFECYCLE };
    let wanted: Vec<i32> = {
        let watchers = watchers(session);
        let is = |(of, only): &(i32, Option<String>)| *of == kind && only.as_ref().is_none_or(|o| o == name);
        watchers.all.iter().filter(|(_, w)| is(w)).map(|(number, _)| *number).collect()
    };
    for number in wanted {
        let mut w = Writer::new();
        w.i32(number).string(name);
        // virNodeDeviceEventLifecycleType, without a detail.
        let procedure = match change {
            Change::Created => {
                w.i32(0).i32(0);
                376
            }
            Change::Deleted => {
                w.i32(1).i32(0);
                376
            }
            Change::Updated => 377,
        };
        session.send(Frame::new(Header::event(procedure), w.finish())).await;
    }
}

/// `CONNECT_NODE_DEVICE_EVENT_REGISTER_ANY`
pub async fn register(call: Call) -> Answered {
    let (event, only) = call.arguments(|r| Ok((r.i32()?, r.option(Reader::string)?)))?;
    if ![LIFECYCLE, UPDATE].contains(&event) {
        return Err(VirError::argument(format!("unsupported node device event ID {event}")));
    }
    let session = &call.session;
    let host = session.front.engine.host_resources(&session.context).await?;
    let before = known(&host, sees_secrets(session));
    if let Some(name) = only.as_ref().filter(|name| !before.contains_key(*name)) {
        let text = format!("no node device with matching name '{name}'");
        return Err(VirError::new(Code::NoNodeDevice, Part::Nodedev, text));
    }
    let mut watchers = watchers(session);
    if watchers.all.len() >= MOST {
        let text = format!("a connection listens for {MOST} events of node devices at most");
        return Err(VirError::state(text));
    }
    if watchers.task.is_none() {
        let front = &session.front;
        let rounds = front.looks.rounds.subscribe();
        if !std::mem::replace(&mut *front.looks.running(), true) {
            // It ends by itself, soon after the last that listens.
            drop(tokio::spawn(look(Arc::downgrade(front), host)));
        }
        let task = tokio::spawn(listen(Arc::downgrade(session), rounds));
        watchers.task = Some(task.abort_handle());
    }
    watchers.last = watchers.last.wrapping_add(1).max(1);
    let number = watchers.last;
    watchers.all.insert(number, (event, only));
    Ok(int(number))
}

/// `CONNECT_NODE_DEVICE_EVENT_DEREGISTER_ANY`
pub async fn deregister(call: Call) -> Answered {
    let number = call.arguments(|r| r.i32())?;
    let mut watchers = watchers(&call.session);
    if watchers.all.remove(&number).is_none() {
        return Err(VirError::argument(format!("node device event callback {number} not registered")));
    }
    if watchers.all.is_empty() {
        watchers.clear();
    }
    Ok(nothing())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_looks_differ_by_what_came_went_and_changed() {
        let known = |all: &[(&str, &str)]| {
            all.iter().map(|(name, document)| ((*name).to_owned(), (*document).to_owned())).collect::<Known>()
        };
        let before = known(&[("computer", "1"), ("net_eth0", "down"), ("usb_1_2", "stick")]);
        let now = known(&[("block_sdb", "disk"), ("computer", "1"), ("net_eth0", "up")]);
        let named = |name: &str, change| (name.to_owned(), change);
        let all = [
            named("usb_1_2", Change::Deleted),
            named("block_sdb", Change::Created),
            named("net_eth0", Change::Updated),
        ];
        assert_eq!(changes(&before, &now), all);
        assert!(changes(&now, &now).is_empty());
    }
}
