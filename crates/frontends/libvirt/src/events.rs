//! Events: who listens for what on a connection, and the engine's events in libvirt's words.

use crate::{
    calls::domain::is_running,
    domain_id, domain_uuid,
    frame::{Frame, Header},
    session::Session,
    xdr::Writer,
    xml,
};
use karst_engine::events::{Event, EventKind};
use karst_model::instance::ExitReason;
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Weak},
};
use tokio::{sync::broadcast::error::RecvError, task::AbortHandle};
use uuid::Uuid;

/// `VIR_DOMAIN_EVENT_ID_LIFECYCLE`
pub const LIFECYCLE: i32 = 0;
/// `VIR_DOMAIN_EVENT_ID_REBOOT`
pub const REBOOT: i32 = 1;
/// Kinds of domain events that may be listened for; Karst tells the two above.
pub const DOMAIN_EVENTS: i32 = 27;
/// Callbacks of one connection.
pub const MOST: usize = 1024;

/// How an event is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Procedures 105 and 167: without a number of the callback.
    Plain,
    /// Procedure 316.
    Numbered,
    /// Procedure 313, of networks.
    Network,
    /// Procedure 368, of pools.
    Pool,
    /// Procedure 380, of secrets.
    Secret,
}

/// A callback.
#[derive(Debug, Clone)]
pub struct Callback {
    /// How.
    pub style: Style,
    /// Kind of event.
    pub event: i32,
    /// Of this object only.
    pub only: Option<Uuid>,
}

/// Callbacks of a connection.
#[derive(Debug, Default)]
pub struct Callbacks {
    all: BTreeMap<i32, Callback>,
    last: i32,
    task: Option<AbortHandle>,
}

impl Callbacks {
    /// Adds one; answers its number.
    pub fn add(&mut self, callback: Callback) -> Option<i32> {
        if self.all.len() >= MOST {
            return None;
        }
        self.last = self.last.checked_add(1)?;
        self.all.insert(self.last, callback);
        Some(self.last)
    }

    /// Removes one of a style that has numbers; was it there?
    pub fn remove(&mut self, number: i32, style: Style) -> bool {
        let is = |c: &Callback| c.style == style;
        self.all.get(&number).is_some_and(is) && self.all.remove(&number).is_some()
    }

    /// Removes the plain ones of a kind; answers how many there were.
    pub fn remove_plain(&mut self, event: i32) -> usize {
        let before = self.all.len();
        self.all.retain(|_, c| !(c.style == Style::Plain && c.event == event));
        before - self.all.len()
    }

    /// Ends all.
    pub fn clear(&mut self) {
        self.all.clear();
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

/// What is known of guests, networks and pools by name, also when they are gone.
#[derive(Debug, Default)]
struct Known {
    guests: HashMap<String, Uuid>,
    networks: HashMap<String, Uuid>,
    pools: HashMap<String, Uuid>,
    /// What they are for: kind, and with what.
    secrets: HashMap<Uuid, (i32, String)>,
}

/// Adds a callback and begins to listen with the first one. `None`: there are too many.
///
/// # Errors
/// Those of the engine.
pub fn listen(session: &Arc<Session>, callback: Callback) -> karst_model::Result<Option<i32>> {
    let mut callbacks = session.callbacks.lock().unwrap_or_else(|e| e.into_inner());
    if callbacks.task.is_none() {
        let mut subscription = session.front.engine.subscribe(&session.context)?;
        let mut refreshed = session.front.refreshed.subscribe();
        // The session owns the task: it must not keep the session.
        let weak = Arc::downgrade(session);
        let mut known = known(session);
        let task = tokio::spawn(async move {
            loop {
                let happened = tokio::select! {
                    biased;
                    event = subscription.recv() => event.map(Happened::Event),
                    pool = refreshed.recv() => pool.map(Happened::Refreshed),
                };
                match happened {
                    Ok(happened) => {
                        let Some(session) = Weak::upgrade(&weak) else { return };
                        match happened {
                            Happened::Event(event) => tell(&session, &mut known, &event).await,
                            Happened::Refreshed(pool) => pool_refreshed(&session, pool).await,
                        }
                    }
                    // libvirt's clients cannot be told that events were lost.
                    Err(RecvError::Lagged(n)) => tracing::warn!(n, "a libvirt client lost events"),
                    Err(RecvError::Closed) => return,
                }
            }
        });
        callbacks.task = Some(task.abort_handle());
    }
    Ok(callbacks.add(callback))
}

/// What a listener hears of.
enum Happened {
    Event(Arc<Event>),
    Refreshed(Uuid),
}

fn known(session: &Session) -> Known {
    let guests = session.guests().unwrap_or_default();
    let engine = &session.front.engine;
    let networks = session.opened().ok().and_then(|o| engine.networks(&session.context, &o.project).ok());
    Known {
        guests: guests.iter().map(|v| (v.instance.name.to_string(), domain_uuid(v))).collect(),
        networks: networks
            .unwrap_or_default()
            .iter()
            .map(|n| (n.name.to_string(), crate::network_uuid(n)))
            .collect(),
        pools: engine
            .pools(&session.context)
            .unwrap_or_default()
            .iter()
            .map(|p| (p.name.to_string(), p.id.uuid()))
            .collect(),
        secrets: session
            .opened()
            .ok()
            .and_then(|o| engine.secrets(&session.context, &o.project).ok())
            .unwrap_or_default()
            .into_iter()
            .map(|s| (s.uuid, (xml::secret::number(s.kind), s.usage)))
            .collect(),
    }
}

/// Name of the object of a path such as `/1.0/instances/NAME?project=P`.
fn object<'a>(source: &'a str, kind: &str) -> Option<&'a str> {
    let rest = source.strip_prefix("/1.0/")?.strip_prefix(kind)?.strip_prefix('/')?;
    rest.split(['?', '/']).next()
}

async fn tell(session: &Arc<Session>, known: &mut Known, event: &Event) {
    let EventKind::Lifecycle { action, source, .. } = &event.kind else { return };
    let Ok(opened) = session.opened() else { return };
    if let Some(name) = object(source, "networks") {
        network(session, known, action, name).await;
        return;
    }
    if let Some(name) = object(source, "storage-pools") {
        pool(session, known, action, name).await;
        return;
    }
    if let Some(uuid) = object(source, "karst/secrets").and_then(|u| u.parse().ok()) {
        if event.project_name == opened.project {
            secret(session, known, action, uuid).await;
        }
        return;
    }
    let Some(name) = object(source, "instances").filter(|_| event.project_name == opened.project) else {
        return;
    };
    let view = session.guest(name).ok();
    if let Some(view) = &view {
        known.guests.insert(name.to_owned(), domain_uuid(view));
    }
    let Some(uuid) = known.guests.get(name).copied() else { return };
    let exit = view.as_ref().and_then(|v| v.runtime.as_ref()).and_then(|r| r.exit.clone());
    let stopped = match exit {
        Some(ExitReason::Forced) => (5, 1),
        Some(ExitReason::Crashed { .. }) => (5, 2),
        _ => (5, 0),
    };
    // virDomainEventType with its detail.
    let changes: &[(i32, i32)] = match *action {
        "instance-created" => &[(0, 0)],
        "instance-deleted" => &[(1, 0)],
        "instance-updated" => &[(0, 1)],
        "instance-renamed" => &[(0, 2)],
        "instance-started" => &[(2, 0)],
        "instance-paused" => &[(3, 0)],
        "instance-resumed" => &[(4, 0)],
        "instance-stopped" | "instance-shutdown" => &[stopped],
        "instance-restarted" => &[(5, 0), (2, 0)],
        "instance-restored" => &[(0, 3)],
        _ => return,
    };
    if *action == "instance-deleted" {
        known.guests.remove(name);
    }
    let id = view.as_ref().filter(|v| is_running(v)).map_or(-1, |v| domain_id(v));
    let callbacks = matching(session, uuid, |c| matches!(c.style, Style::Plain | Style::Numbered));
    for (number, callback) in callbacks {
        let mut head = Writer::new();
        if callback.style == Style::Numbered {
            head.i32(number);
        }
        head.string(name).uuid(uuid).i32(id);
        let numbered = callback.style == Style::Numbered;
        match callback.event {
            LIFECYCLE => {
                let head = head.finish();
                for (kind, detail) in changes {
                    let mut w = Writer::new();
                    w.i32(*kind).i32(*detail);
                    let payload = [head.clone(), w.finish()].concat();
                    let procedure = if numbered { 318 } else { 107 };
                    session.send(Frame::new(Header::event(procedure), payload)).await;
                }
            }
            REBOOT if *action == "instance-restarted" => {
                let procedure = if numbered { 319 } else { 169 };
                session.send(Frame::new(Header::event(procedure), head.finish())).await;
            }
            _ => {}
        }
    }
}

fn matching(session: &Session, uuid: Uuid, is: impl Fn(&Callback) -> bool) -> Vec<(i32, Callback)> {
    let callbacks = session.callbacks.lock().unwrap_or_else(|e| e.into_inner());
    let wanted = callbacks.all.iter().filter(|(_, c)| is(c) && c.only.is_none_or(|only| only == uuid));
    wanted.map(|(n, c)| (*n, c.clone())).collect()
}

async fn network(session: &Arc<Session>, known: &mut Known, action: &str, name: &str) {
    // virNetworkEventLifecycleType; all of Karst's run as soon as they are there.
    let changes: &[i32] = match action {
        "network-created" => &[0, 2],
        "network-deleted" => &[3, 1],
        _ => return,
    };
    let found = session.opened().ok().and_then(|o| {
        session.front.engine.network(&session.context, &o.project, name).ok().map(|n| crate::network_uuid(&n))
    });
    if let Some(uuid) = found {
        known.networks.insert(name.to_owned(), uuid);
    }
    let Some(uuid) = known.networks.get(name).copied() else { return };
    if action == "network-deleted" {
        known.networks.remove(name);
    }
    for (number, _) in matching(session, uuid, |c| c.style == Style::Network) {
        for change in changes {
            let mut w = Writer::new();
            w.i32(number).string(name).uuid(uuid).i32(*change).i32(0);
            session.send(Frame::new(Header::event(315), w.finish())).await;
        }
    }
}

/// `VIR_STORAGE_POOL_EVENT_ID_LIFECYCLE`, `_REFRESH`.
const POOL_LIFECYCLE: i32 = 0;
const POOL_REFRESH: i32 = 1;

async fn pool(session: &Arc<Session>, known: &mut Known, action: &str, name: &str) {
    // virStoragePoolEventLifecycleType: defined, created, started; stopped, deleted, undefined. Pools here are all or
    // nothing of these.
    let changes: &[i32] = match action {
        "storage-pool-created" => &[0, 4, 2],
        "storage-pool-updated" => &[0],
        "storage-pool-deleted" => &[3, 5, 1],
        _ => return,
    };
    let found = session.front.engine.pool(&session.context, name).ok().map(|p| p.id.uuid());
    if let Some(uuid) = found {
        known.pools.insert(name.to_owned(), uuid);
    }
    let Some(uuid) = known.pools.get(name).copied() else { return };
    if action == "storage-pool-deleted" {
        known.pools.remove(name);
    }
    for (number, _) in matching(session, uuid, |c| c.style == Style::Pool && c.event == POOL_LIFECYCLE) {
        for change in changes {
            let mut w = Writer::new();
            w.i32(number).string(name).uuid(uuid).i32(*change).i32(0);
            session.send(Frame::new(Header::event(370), w.finish())).await;
        }
    }
}

/// `VIR_SECRET_EVENT_ID_LIFECYCLE`, `_VALUE_CHANGED`.
const SECRET_LIFECYCLE: i32 = 0;
const SECRET_VALUE_CHANGED: i32 = 1;

async fn secret(session: &Arc<Session>, known: &mut Known, action: &str, uuid: Uuid) {
    // With what of virSecretEventLifecycleType: defined, undefined.
    let (kind, change) = match action {
        "secret-created" | "secret-updated" => (SECRET_LIFECYCLE, Some(0)),
        "secret-deleted" => (SECRET_LIFECYCLE, Some(1)),
        "secret-value-changed" => (SECRET_VALUE_CHANGED, None),
        _ => return,
    };
    let Ok(opened) = session.opened() else { return };
    if let Ok(secret) = session.front.engine.secret(&session.context, &opened.project, uuid) {
        known.secrets.insert(uuid, (xml::secret::number(secret.kind), secret.usage));
    }
    let Some((number_of_kind, usage)) = known.secrets.get(&uuid).cloned() else { return };
    if action == "secret-deleted" {
        known.secrets.remove(&uuid);
    }
    for (number, _) in matching(session, uuid, |c| c.style == Style::Secret && c.event == kind) {
        let mut w = Writer::new();
        w.i32(number).uuid(uuid).i32(number_of_kind).string(&usage);
        let procedure = match change {
            Some(change) => {
                w.i32(change).i32(0);
                382
            }
            None => 383,
        };
        session.send(Frame::new(Header::event(procedure), w.finish())).await;
    }
}

async fn pool_refreshed(session: &Arc<Session>, uuid: Uuid) {
    let pools = session.front.engine.pools(&session.context).unwrap_or_default();
    let Some(pool) = pools.into_iter().find(|p| p.id.uuid() == uuid) else { return };
    for (number, _) in matching(session, uuid, |c| c.style == Style::Pool && c.event == POOL_REFRESH) {
        let mut w = Writer::new();
        w.i32(number).string(&pool.name).uuid(uuid);
        session.send(Frame::new(Header::event(373), w.finish())).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_out_of_paths() {
        assert_eq!(object("/1.0/instances/c1?project=p", "instances"), Some("c1"));
        assert_eq!(object("/1.0/instances/c1/snapshots/s", "instances"), Some("c1"));
        assert_eq!(object("/1.0/networks/n", "instances"), None);
    }

    #[test]
    fn callbacks_are_removed_by_their_own_kind() {
        let mut all = Callbacks::default();
        let plain = Callback { style: Style::Plain, event: LIFECYCLE, only: None };
        let first = all.add(plain.clone()).unwrap();
        let second = all.add(Callback { style: Style::Network, ..plain.clone() }).unwrap();
        assert!(!all.remove(first, Style::Numbered) && !all.remove(second, Style::Numbered));
        assert!(all.remove(second, Style::Network));
        assert_eq!(all.remove_plain(LIFECYCLE), 1);
        (0..MOST).for_each(|_| assert!(all.add(plain.clone()).is_some()));
        assert!(all.add(plain).is_none());
    }
}
