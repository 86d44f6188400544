//! Events: who listens for what on a connection, and the engine's events in libvirt's words.

mod news;

use crate::{
    calls::{backup, copies, domain::is_running, figures::disks},
    domain_id,
    frame::{Frame, Header},
    instance_uuid,
    session::Session,
    xdr::{Typed, Writer},
    xml,
};
use karst_engine::{
    InstanceView,
    compute::disk_copy::{self, merge::Work},
    events::{
        DISK_THRESHOLD, Event, EventKind, OLD_NAME, PAUSED, RAN, REASON, RESUMED, RUNS, Subject, happened,
        reason,
    },
};
use karst_model::{
    InstanceId, OperationId,
    instance::{Instance, Runtime},
    network::Network,
    news::Happened,
    operation::{Operation, OperationState},
    secret::Secret,
    storage::Pool,
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
};
use tokio::{sync::broadcast::error::RecvError, task::AbortHandle};
use uuid::Uuid;

/// `VIR_DOMAIN_EVENT_ID_LIFECYCLE`
pub const LIFECYCLE: i32 = 0;
/// `VIR_DOMAIN_EVENT_ID_REBOOT`
pub const REBOOT: i32 = 1;
/// `VIR_DOMAIN_EVENT_ID_BLOCK_JOB`: disks by the paths of their volumes.
pub const BLOCK_JOB: i32 = 8;
/// `VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2`: disks by their names.
pub const BLOCK_JOB_2: i32 = 16;
/// `VIR_DOMAIN_EVENT_ID_JOB_COMPLETED`: a backup of disks, or what wrote memory, has ended.
pub const JOB_COMPLETED: i32 = 21;
/// `VIR_DOMAIN_EVENT_ID_BLOCK_THRESHOLD`: somebody wrote behind the threshold of a disk.
pub const BLOCK_THRESHOLD: i32 = 24;
/// Kinds of domain events that may be listened for; Karst tells those above and those of `news`.
pub const DOMAIN_EVENTS: i32 = 27;
/// Callbacks of one connection.
pub const MOST: usize = 1024;

/// What is said of a domain was changed through some connection.
#[derive(Debug, Clone)]
pub struct Described {
    /// Of which.
    pub instance: InstanceId,
    /// `virDomainMetadataType`.
    pub about: i32,
    /// Whose words they are, of an application's.
    pub uri: Option<String>,
}

/// What the run of a domain is given was changed through some connection.
#[derive(Debug, Clone)]
pub struct Tuned {
    /// Of which.
    pub instance: InstanceId,
    /// What, in the words of `VIR_DOMAIN_TUNABLE_*`.
    pub parameters: Vec<(String, Typed)>,
}

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

/// Adds a callback and begins to listen with the first one. `None`: there are too many.
///
/// # Errors
/// Those of the engine.
pub fn listen(session: &Arc<Session>, callback: Callback) -> karst_model::Result<Option<i32>> {
    let mut callbacks = session.callbacks.lock().unwrap_or_else(|e| e.into_inner());
    if callbacks.task.is_none() {
        let mut subscription = session.front.engine.subscribe(&session.context)?;
        let mut refreshed = session.front.refreshed.subscribe();
        let mut described = session.front.described.subscribe();
        let mut tuned = session.front.tuned.subscribe();
        // The session owns the task: it must not keep the session.
        let weak = Arc::downgrade(session);
        let task = tokio::spawn(async move {
            let mut jobs = Jobs::new();
            loop {
                let heard = tokio::select! {
                    biased;
                    event = subscription.recv() => event.map(Heard::Event),
                    pool = refreshed.recv() => pool.map(Heard::Refreshed),
                    said = described.recv() => said.map(Heard::Described),
                    tuned = tuned.recv() => tuned.map(Heard::Tuned),
                };
                match heard {
                    Ok(heard) => {
                        let Some(session) = Weak::upgrade(&weak) else { return };
                        match heard {
                            Heard::Event(event) => match &event.kind {
                                EventKind::Operation(o) => {
                                    block_job(&session, &event, o, &mut jobs).await;
                                    backup_job(&session, &event, o, &mut jobs).await;
                                }
                                _ => tell(&session, &event).await,
                            },
                            Heard::Refreshed(pool) => pool_refreshed(&session, pool).await,
                            Heard::Described(said) => {
                                if let Some(view) = own(&session, said.instance) {
                                    let (id, uri) = (domain_id(&view), said.uri.as_deref());
                                    news::described(&session, &view.instance, id, said.about, uri).await;
                                }
                            }
                            Heard::Tuned(tuned) => {
                                if let Some(view) = own(&session, tuned.instance) {
                                    let id = domain_id(&view);
                                    news::tuned(&session, &view.instance, id, &tuned.parameters).await;
                                }
                            }
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
enum Heard {
    Event(Arc<Event>),
    Refreshed(Uuid),
    Described(Described),
    Tuned(Tuned),
}

/// A domain of the connection, and nobody else's.
fn own(session: &Session, instance: InstanceId) -> Option<Arc<InstanceView>> {
    session.guests().unwrap_or_default().into_iter().find(|v| v.instance.id == instance)
}

async fn tell(session: &Arc<Session>, event: &Event) {
    let EventKind::Lifecycle { action, context, .. } = &event.kind else { return };
    let Ok(opened) = session.opened() else { return };
    let own = event.project_name == opened.project;
    match &event.subject {
        Some(Subject::Network(of)) => network(session, action, of).await,
        Some(Subject::Pool(of)) => pool(session, action, of).await,
        Some(Subject::Secret(of)) if own => secret(session, action, of).await,
        Some(Subject::Instance(of, _)) if own && *action == DISK_THRESHOLD => {
            threshold(session, of, context).await;
        }
        Some(Subject::Instance(of, runtime)) if own && of.kind == opened.driver.kind() => {
            match happened(action, context) {
                Some(what) => news::tell(session, of, &what).await,
                None => guest(session, action, of, runtime.as_deref(), context).await,
            }
        }
        _ => {}
    }
}

/// `virDomainEventStoppedDetailType` of why a guest ended.
fn stopped(context: &BTreeMap<String, serde_json::Value>, runtime: Option<&Runtime>) -> (i32, i32) {
    let said = context.get(REASON).and_then(serde_json::Value::as_str);
    let detail = match said.or_else(|| reason(runtime.and_then(|r| r.exit.as_ref()), false)) {
        Some("forced") => 1,
        Some("crashed") => 2,
        Some("saved") => 4,
        _ => 0,
    };
    (5, detail)
}

/// `virDomainEventType` with its detail, of what the engine says of an instance as it was when that happened.
fn changes(
    action: &str,
    of: &Instance,
    context: &BTreeMap<String, serde_json::Value>,
    runtime: Option<&Runtime>,
) -> Vec<(i32, i32)> {
    let flag = |key: &str| context.get(key).and_then(serde_json::Value::as_bool) == Some(true);
    match action {
        // What is transient was never defined.
        "instance-created" | "instance-deleted" if of.ephemeral => vec![],
        "instance-created" => vec![(0, 0)],
        "instance-deleted" => vec![(1, 0)],
        "instance-updated" => vec![(0, 1)],
        "instance-renamed" => vec![(0, 2)],
        "instance-started" if flag(RESUMED) => vec![(2, 1)],
        "instance-started" => vec![(2, 0)],
        "instance-paused" => vec![(3, 0)],
        "instance-resumed" => vec![(4, 0)],
        "instance-stopped" | "instance-shutdown" => vec![stopped(context, runtime)],
        "instance-restarted" => vec![stopped(context, None), (2, 0)],
        // From a snapshot: stopped, defined, started, suspended.
        "instance-restored" => {
            let all = [(flag(RAN), (5, 6)), (true, (0, 3)), (flag(RUNS), (2, 3)), (flag(PAUSED), (3, 5))];
            all.into_iter().filter(|(is, _)| *is).map(|(_, change)| change).collect()
        }
        _ => vec![],
    }
}

async fn guest(
    session: &Arc<Session>,
    action: &str,
    of: &Instance,
    runtime: Option<&Runtime>,
    context: &BTreeMap<String, serde_json::Value>,
) {
    let (name, uuid) = (&*of.name, instance_uuid(of));
    let view = session.guest(name).ok().filter(|v| v.instance.id == of.id);
    let id = view.as_ref().filter(|v| is_running(v)).map_or(-1, |v| domain_id(v));
    // Who knows it by its name loses that one.
    if let ("instance-renamed", Some(old)) = (action, context.get(OLD_NAME).and_then(|n| n.as_str())) {
        lifecycle(session, old, uuid, id, &[(1, 1)]).await;
    }
    lifecycle(session, name, uuid, id, &changes(action, of, context, runtime)).await;
    if action == "instance-restarted" {
        news::tell(session, of, &Happened::Reset).await;
    }
}

/// Tells changes of a domain's life: `virDomainEventType` with its detail.
async fn lifecycle(session: &Arc<Session>, name: &str, uuid: Uuid, id: i32, changes: &[(i32, i32)]) {
    let wanted = |c: &Callback| c.event == LIFECYCLE && matches!(c.style, Style::Plain | Style::Numbered);
    for (number, callback) in matching(session, uuid, wanted) {
        let numbered = callback.style == Style::Numbered;
        for (kind, detail) in changes {
            let mut w = Writer::new();
            if numbered {
                w.i32(number);
            }
            w.string(name).uuid(uuid).i32(id).i32(*kind).i32(*detail);
            let procedure = if numbered { 318 } else { 107 };
            session.send(Frame::new(Header::event(procedure), w.finish())).await;
        }
    }
}

/// Tells that a machine has written behind the threshold of a disk.
async fn threshold(session: &Arc<Session>, of: &Instance, said: &BTreeMap<String, serde_json::Value>) {
    let number = |key: &str| said.get(key).and_then(serde_json::Value::as_u64);
    let slot = said.get("slot").and_then(serde_json::Value::as_str);
    let (Some(slot), Some(bytes), Some(excess)) = (slot, number("threshold"), number("excess")) else {
        return;
    };
    let Some(view) = session.guest(&of.name).ok().filter(|v| v.instance.id == of.id) else { return };
    let found = disks(&session.front.engine.inner().inventory.read(), &view);
    let Some(disk) = found.into_iter().find(|d| d.slot == slot) else { return };
    let (uuid, id) = (instance_uuid(of), domain_id(&view));
    let wanted = |c: &Callback| c.style == Style::Numbered && c.event == BLOCK_THRESHOLD;
    for (number, _) in matching(session, uuid, wanted) {
        let mut w = Writer::new();
        w.i32(number).string(&of.name).uuid(uuid).i32(id).string(&disk.target);
        w.optional(disk.path.as_deref()).u64(bytes).u64(excess);
        session.send(Frame::new(Header::event(385), w.finish())).await;
    }
}

/// What was last said of each job: a `virConnectDomainEventBlockJobStatus`.
type Jobs = BTreeMap<OperationId, i32>;

/// Jobs that a listener remembers.
const JOBS: usize = 1024;

/// Tells what becomes of the copy of a disk: an operation that says so of itself.
async fn block_job(session: &Arc<Session>, event: &Event, operation: &Operation, jobs: &mut Jobs) {
    let Some(copy) = operation.metadata.get(disk_copy::METADATA) else { return };
    let text = |key: &str| copy.get(key).and_then(serde_json::Value::as_str);
    let ready = copy.get("ready").and_then(serde_json::Value::as_bool) == Some(true);
    // Completed, failed, cancelled, ready.
    let status = match operation.state {
        OperationState::Success => 0,
        OperationState::Failure | OperationState::NeedsAttention => 1,
        OperationState::Cancelled => 2,
        OperationState::Running if ready => 3,
        _ => return,
    };
    if !session.opened().is_ok_and(|o| o.project == event.project_name) {
        return;
    }
    if jobs.len() > JOBS {
        jobs.clear();
    }
    if jobs.insert(operation.id, status) == Some(status) {
        return;
    }
    let kind = copies::job_type(match text("job") {
        Some("pull") => Some(Work::Pull),
        Some("commit") => Some(Work::Commit),
        Some("active-commit") => Some(Work::ActiveCommit),
        _ => None,
    });
    let instance = text("instance").and_then(|i| i.parse::<InstanceId>().ok());
    let guests = session.guests().unwrap_or_default();
    let Some(view) = guests.into_iter().find(|v| Some(v.instance.id) == instance) else { return };
    let slot = text("device").and_then(|d| view.instance.identities.get(d)).map(|i| i.slot.clone());
    let found = disks(&session.front.engine.inner().inventory.read(), &view);
    let Some(disk) = found.into_iter().find(|d| Some(&d.slot) == slot.as_ref()) else { return };
    let (uuid, id) = (instance_uuid(&view.instance), domain_id(&view));
    let callbacks = matching(session, uuid, |c| matches!(c.style, Style::Plain | Style::Numbered));
    for (number, callback) in callbacks {
        let numbered = callback.style == Style::Numbered;
        let (procedure, which) = match (callback.event, numbered) {
            (BLOCK_JOB, false) => (241, disk.path.as_deref().unwrap_or(&disk.target)),
            (BLOCK_JOB, true) => (326, disk.path.as_deref().unwrap_or(&disk.target)),
            (BLOCK_JOB_2, true) => (339, disk.target.as_str()),
            _ => continue,
        };
        let mut w = Writer::new();
        if numbered {
            w.i32(number);
        }
        w.string(&view.instance.name).uuid(uuid).i32(id).string(which).i32(kind).i32(status);
        session.send(Frame::new(Header::event(procedure), w.finish())).await;
    }
}

/// Tells that a backup of a domain's disks, or what wrote its memory, has ended: an operation that says so of itself.
async fn backup_job(session: &Arc<Session>, event: &Event, operation: &Operation, jobs: &mut Jobs) {
    let Some((kind, params)) = backup::completed(operation) else { return };
    let own = session.opened().is_ok_and(|o| o.project == event.project_name);
    if jobs.len() > JOBS {
        jobs.clear();
    }
    if !own || jobs.insert(operation.id, kind) == Some(kind) {
        return;
    }
    let instance = backup::instance_of(operation).and_then(|id| id.parse::<InstanceId>().ok());
    let guests = session.guests().unwrap_or_default();
    let Some(view) = guests.into_iter().find(|v| Some(v.instance.id) == instance) else { return };
    let (uuid, id) = (instance_uuid(&view.instance), domain_id(&view));
    let wanted = |c: &Callback| c.style == Style::Numbered && c.event == JOB_COMPLETED;
    for (number, _) in matching(session, uuid, wanted) {
        let mut w = Writer::new();
        w.i32(number).string(&view.instance.name).uuid(uuid).i32(id);
        w.array(&params, |w, (field, value)| {
            w.typed(field, value);
        });
        session.send(Frame::new(Header::event(363), w.finish())).await;
    }
}

fn matching(session: &Session, uuid: Uuid, is: impl Fn(&Callback) -> bool) -> Vec<(i32, Callback)> {
    let callbacks = session.callbacks.lock().unwrap_or_else(|e| e.into_inner());
    let wanted = callbacks.all.iter().filter(|(_, c)| is(c) && c.only.is_none_or(|only| only == uuid));
    wanted.map(|(n, c)| (*n, c.clone())).collect()
}

async fn network(session: &Arc<Session>, action: &str, of: &Network) {
    // virNetworkEventLifecycleType: defined, undefined, started, stopped. What is transient was never defined.
    let (defined, active) = (!of.life.transient, of.is_active());
    let changes: &[i32] = match (action, defined, active) {
        ("network-created", true, true) => &[0, 2],
        ("network-created", true, false) | ("network-defined", ..) => &[0],
        ("network-created", false, _) | ("network-started", ..) => &[2],
        ("network-deleted", true, true) => &[3, 1],
        ("network-deleted", true, false) | ("network-undefined", ..) => &[1],
        ("network-deleted", false, true) | ("network-stopped", ..) => &[3],
        _ => return,
    };
    let (name, uuid) = (&*of.name, crate::network_uuid(of));
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

async fn pool(session: &Arc<Session>, action: &str, of: &Pool) {
    // virStoragePoolEventLifecycleType. Who makes a pool by Incus' API has it all at once, and who deletes one too.
    const DEFINED: i32 = 0;
    const UNDEFINED: i32 = 1;
    const STARTED: i32 = 2;
    const STOPPED: i32 = 3;
    const CREATED: i32 = 4;
    const DELETED: i32 = 5;
    let life = of.life;
    let changes: &[i32] = match action {
        // What is transient was never defined.
        "storage-pool-created" if life.transient && life.stopped => &[],
        "storage-pool-created" if life.transient => &[STARTED],
        "storage-pool-created" if life.stopped => &[DEFINED],
        "storage-pool-created" => &[DEFINED, CREATED, STARTED],
        "storage-pool-built" => &[CREATED],
        "storage-pool-started" => &[STARTED],
        "storage-pool-stopped" => &[STOPPED],
        "storage-pool-cleared" => &[DELETED],
        "storage-pool-forgotten" | "storage-pool-updated" if life.transient => &[],
        "storage-pool-forgotten" => &[UNDEFINED],
        "storage-pool-updated" => &[DEFINED],
        "storage-pool-deleted" if life.unbuilt => &[UNDEFINED],
        "storage-pool-deleted" if life.stopped => &[DELETED, UNDEFINED],
        "storage-pool-deleted" => &[STOPPED, DELETED, UNDEFINED],
        _ => return,
    };
    let (name, uuid) = (&*of.name, of.id.uuid());
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

async fn secret(session: &Arc<Session>, action: &str, of: &Secret) {
    // With what of virSecretEventLifecycleType: defined, undefined.
    let (kind, change) = match action {
        "secret-created" | "secret-updated" => (SECRET_LIFECYCLE, Some(0)),
        "secret-deleted" => (SECRET_LIFECYCLE, Some(1)),
        "secret-value-changed" => (SECRET_VALUE_CHANGED, None),
        _ => return,
    };
    let (uuid, number_of_kind) = (of.uuid, xml::secret::number(of.kind));
    for (number, _) in matching(session, uuid, |c| c.style == Style::Secret && c.event == kind) {
        let mut w = Writer::new();
        w.i32(number).uuid(uuid).i32(number_of_kind).string(&of.usage);
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
    fn life_is_told_with_its_details() {
        let of: Instance = serde_json::from_value(serde_json::json!({
            "id": Uuid::nil(), "project": Uuid::nil(), "name": "v1", "vmid": 100, "kind": "virtual-machine",
            "architecture": "x86_64", "pool": Uuid::nil(), "root": Uuid::nil(), "node": Uuid::nil(),
            "generation": {"incarnation": 1, "n": 1}, "power": "stopped", "spec_version": 1,
            "created_at": "2026-01-01T00:00:00Z",
        }))
        .unwrap();
        let said = |action: &str, context: serde_json::Value| {
            let serde_json::Value::Object(context) = context else { unreachable!("an object") };
            changes(action, &of, &context.into_iter().collect(), None)
        };
        use serde_json::json;
        assert_eq!(said("instance-stopped", json!({"reason": "saved"})), [(5, 4)]);
        assert_eq!(said("instance-shutdown", json!({"reason": "crashed"})), [(5, 2)]);
        assert_eq!(said("instance-restarted", json!({"reason": "forced"})), [(5, 1), (2, 0)]);
        assert_eq!(said("instance-started", json!({"resumed": true})), [(2, 1)]);
        assert_eq!(said("instance-started", json!({})), [(2, 0)]);
        let restored = json!({"ran": true, "runs": true, "paused": true});
        assert_eq!(said("instance-restored", restored), [(5, 6), (0, 3), (2, 3), (3, 5)]);
        assert_eq!(said("instance-restored", json!({})), [(0, 3)]);
        let transient = Instance { ephemeral: true, ..of.clone() };
        for action in ["instance-created", "instance-deleted"] {
            assert!(changes(action, &transient, &BTreeMap::new(), None).is_empty());
            assert_eq!(changes(action, &of, &BTreeMap::new(), None).len(), 1);
        }
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
