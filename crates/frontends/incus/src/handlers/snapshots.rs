//! Snapshots of instances and of custom volumes.

use super::{list as respond_list, volumes::demand_custom};
use crate::{
    app::{Call, Taken as TakenCall, finished, running},
    fields::Fields,
    filter::Filter,
    respond::{Etag, Reply, accepted, empty, sync_etag},
    wire::{
        self,
        operation::OperationView,
        snapshot::{SnapshotView, VolumeSnapshotView},
    },
};
use jiff::Timestamp;
use karst_engine::{
    Context, Engine, NewOperation,
    snapshots::{Origin, Taken, change::UpdateSnapshot, create::CreateSnapshot},
};
use karst_model::{Error, Result, access::Permission, operation::OperationClass, snapshot::Quiesce};
use serde::Serialize;

const VIEW: &str = "snapshot";

/// What views show of a snapshot and changes carry back without meaning.
const READ_ONLY: &[&str] = &[
    "architecture",
    "config",
    "created_at",
    "devices",
    "ephemeral",
    "expanded_config",
    "expanded_devices",
    "last_used_at",
    "name",
    "profiles",
    "size",
    "stateful",
    "content_type",
    "restore",
    "description",
];

/// What the path is about, and the name of the snapshot in it.
pub(super) struct Place {
    project: String,
    pool: Option<String>,
    name: String,
    pub(super) snapshot: String,
}

impl Place {
    pub(super) fn of(project: &str, params: &[String]) -> Result<Self> {
        let at = |n: usize| params.get(n).cloned().unwrap_or_default();
        let project = project.to_owned();
        // Instances have one parameter before that of the snapshot, volumes three.
        if params.len() <= 2 {
            return Ok(Self { project, pool: None, name: at(0), snapshot: at(1) });
        }
        demand_custom(&at(1))?;
        Ok(Self { project, pool: Some(at(0)), name: at(2), snapshot: at(3) })
    }

    pub(super) fn origin(&self) -> Origin<'_> {
        match &self.pool {
            None => Origin::Instance { project: &self.project, name: &self.name },
            Some(pool) => Origin::Volume { project: &self.project, pool, name: &self.name },
        }
    }

    fn path(&self, snapshot: &str) -> String {
        self.path_in("snapshots", snapshot)
    }

    /// Kind of resource in operations, and the collection.
    fn kind(&self) -> (&'static str, &'static str) {
        let kind = if self.pool.is_some() { "storage_volume_snapshots" } else { "instances_snapshots" };
        (kind, "snapshots")
    }

    /// Path of what belongs to it, of a collection such as `snapshots`.
    pub(super) fn path_in(&self, collection: &str, snapshot: &str) -> String {
        let kind = match &self.pool {
            None => format!("instances/{}/{collection}", wire::segment(&self.name)),
            Some(pool) => format!(
                "storage-pools/{}/volumes/custom/{}/{collection}",
                wire::segment(pool),
                wire::segment(&self.name)
            ),
        };
        wire::path(&kind, snapshot, &self.project)
    }
}

/// A view of either kind.
#[derive(Serialize)]
#[serde(untagged)]
enum View<'a> {
    Instance(Box<SnapshotView<'a>>),
    Volume(VolumeSnapshotView<'a>),
}

fn view<'a>(engine: &Engine, taken: &'a Taken, volume: Option<&str>) -> View<'a> {
    let records = engine.inner().inventory.read();
    match taken {
        Taken::Instance { snapshot } => View::Instance(Box::new(SnapshotView::of(&records, snapshot))),
        Taken::Volume { snapshot } => View::Volume(VolumeSnapshotView::of(&records, snapshot, volume)),
    }
}

fn id(taken: &Taken) -> (uuid::Uuid, u64) {
    match taken {
        Taken::Instance { snapshot } => (snapshot.id.uuid(), snapshot.spec_version),
        Taken::Volume { snapshot } => (snapshot.id.uuid(), snapshot.spec_version),
    }
}

fn name(taken: &Taken) -> &str {
    match taken {
        Taken::Instance { snapshot } => &snapshot.name,
        Taken::Volume { snapshot } => &snapshot.name,
    }
}

/// `GET …/snapshots`
///
/// # Errors
/// Those of the engine.
pub async fn list(call: Call) -> Result<Reply> {
    let recursion = call.query.recursion()?;
    let filter = Filter::parse(call.query.get("filter"))?;
    let place = Place::of(call.project(), &call.params)?;
    let all = call.engine().snapshots(&call.context, place.origin())?;
    respond_list(
        recursion,
        &filter,
        all.iter().map(|s| (view(call.engine(), s, Some(&place.name)), place.path(name(s)))),
    )
}

/// `GET …/snapshots/{snapshot}`
///
/// # Errors
/// Those of the engine.
pub async fn get(call: Call) -> Result<Reply> {
    let place = Place::of(call.project(), &call.params)?;
    let taken = call.engine().snapshot(&call.context, place.origin(), &place.snapshot)?;
    let (uuid, version) = id(&taken);
    sync_etag(&view(call.engine(), &taken, None), &Etag::of(VIEW, uuid, version))
}

/// A time as clients write it: absent, or never (Go's zero time), or then.
pub(super) fn time(f: &mut Fields, field: &'static str) -> Result<Option<Option<Timestamp>>> {
    let Some(text) = f.text(field)?.filter(|t| !t.is_empty()) else { return Ok(None) };
    if text == wire::NEVER {
        return Ok(Some(None));
    }
    let time = text.parse().map_err(|_| {
        Error::invalid(field, format!("{text:?} is not a time; write it as 2026-01-31T12:00:00Z"))
    });
    time.map(|t| Some(Some(t)))
}

/// `POST …/snapshots`
///
/// # Errors
/// Those of the engine; invalid by field.
pub async fn create(call: Call) -> Result<Reply> {
    let place = Place::of(call.project(), &call.params)?;
    let (call, mut f) = call.fields().await?;
    let request = CreateSnapshot {
        name: f.text("name")?,
        // Clients that know no expiry send none; never is said by Go's zero time.
        expires_at: time(&mut f, "expires_at")?,
        description: f.text("description")?.unwrap_or_default(),
        note: String::new(),
        automatic: false,
        stateful: f.flag("stateful")?,
        quiesce: match f.text("quiesce")?.filter(|t| !t.is_empty()) {
            Some(text) => Some(Quiesce::parse("quiesce", &text)?),
            None => None,
        },
    };
    f.finish(&["disk_only"])?;
    running(&call.engine().snapshot_create(&call.context, place.origin(), request).await?)
}

/// `POST …/snapshots/{snapshot}`: rename.
///
/// # Errors
/// Those of the engine.
pub async fn rename(call: Call) -> Result<Reply> {
    let place = Place::of(call.project(), &call.params)?;
    let (call, mut f) = call.fields().await?;
    let new = f.need_text("name")?;
    if f.flag("migration")? {
        return Err(Error::unsupported("moving snapshots to other servers is not there yet").at("migration"));
    }
    f.finish(&["live", "target"])?;
    call.engine().snapshot_rename(&call.context, place.origin(), &place.snapshot, &new).await?;
    ended(&call.app.engine, &call.context, &place, "Renaming snapshot", place.kind(), &new)
}

/// 202 with an operation that has ended well already: for what Incus does in the background and Karst at once.
pub(super) fn ended(
    engine: &Engine,
    context: &Context,
    place: &Place,
    words: &str,
    (kind, collection): (&str, &str),
    snapshot: &str,
) -> Result<Reply> {
    let id = engine.project(context, &place.project, Permission::ProjectView)?.id;
    let new = NewOperation {
        class: OperationClass::Task,
        ..NewOperation::task(words, Some(id), kind, place.path_in(collection, snapshot))
    };
    let operations = &engine.inner().operations;
    let live = operations.begin(context, new);
    operations.end(&live, Ok(Default::default()));
    let record = live.snapshot();
    accepted(&record.id.to_string(), &OperationView::of(&record))
}

async fn change(call: Call, merge: bool) -> Result<(TakenCall, Place)> {
    let place = Place::of(call.project(), &call.params)?;
    let now = call.engine().snapshot(&call.context, place.origin(), &place.snapshot)?;
    let (uuid, version) = id(&now);
    let if_version = call.expected(VIEW, uuid, version)?;
    let kept = match &now {
        Taken::Instance { snapshot } => snapshot.expires_at,
        Taken::Volume { snapshot } => snapshot.expires_at,
    };
    let (call, mut f) = call.fields().await?;
    let update = UpdateSnapshot {
        expires_at: time(&mut f, "expires_at")?.unwrap_or(if merge { kept } else { None }),
        description: f.text("description")?,
        note: None,
        if_version,
    };
    f.finish(READ_ONLY)?;
    call.engine().snapshot_update(&call.context, place.origin(), &place.snapshot, update).await?;
    Ok((call, place))
}

async fn changed(call: Call, merge: bool) -> Result<Reply> {
    let (call, place) = change(call, merge).await?;
    // Incus answers at once for volumes, by an operation for instances.
    if place.pool.is_some() {
        return Ok(empty());
    }
    ended(&call.app.engine, &call.context, &place, "Updating snapshot", place.kind(), &place.snapshot)
}

/// `PUT …/snapshots/{snapshot}`
///
/// # Errors
/// Those of the engine; invalid by field.
pub async fn replace(call: Call) -> Result<Reply> {
    changed(call, false).await
}

/// `PATCH …/snapshots/{snapshot}`
///
/// # Errors
/// Those of the engine; invalid by field.
pub async fn patch(call: Call) -> Result<Reply> {
    changed(call, true).await
}

/// `DELETE …/snapshots/{snapshot}`
///
/// # Errors
/// Those of the engine.
pub async fn delete(call: Call) -> Result<Reply> {
    let place = Place::of(call.project(), &call.params)?;
    running(&call.engine().snapshot_delete(&call.context, place.origin(), &place.snapshot).await?)
}

/// `restore` of a `PUT` on an instance or custom volume, when it is there.
///
/// # Errors
/// Those of the engine.
pub(super) async fn restore(
    call: &TakenCall,
    origin: Origin<'_>,
    snapshot: &str,
    (at_once, memory): (bool, bool),
) -> Result<Reply> {
    // Clients write the name also with that of what it is of, as in `c1/snap0`.
    let (Origin::Instance { name, .. } | Origin::Volume { name, .. }) = origin;
    let own = snapshot.strip_prefix(name).and_then(|rest| rest.strip_prefix('/')).unwrap_or(snapshot);
    let operation = call.engine().snapshot_restore_with(&call.context, origin, own, memory).await?;
    if at_once {
        finished(&operation).await?;
        return Ok(empty());
    }
    running(&operation)
}
