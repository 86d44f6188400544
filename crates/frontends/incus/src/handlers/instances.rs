//! `/1.0/instances`: lists, creation, changes, power, state.

use super::array;
use crate::{
    app::{App, Call, running},
    fields::Fields,
    filter::Filter,
    page::{self, Page},
    respond::{Etag, Reply, accepted, sync, sync_etag},
    wire::{
        self,
        instance::{InstanceView as Wire, StateView},
        operation::OperationView,
        snapshot::SnapshotView,
    },
};
use bytes::Bytes;
use karst_engine::{
    Context, InstanceView, NewOperation, Records,
    compute::{
        copy::CopyInstance,
        create::{CreateInstance, InstanceSource},
        power::PowerRequest,
        relocate::MoveInstance,
        update::UpdateInstance,
    },
    images::remote::RemoteSource,
    snapshots::Origin,
};
use karst_model::{
    Error, ErrorKind, Result, Vmid,
    access::Permission,
    guest::Metrics,
    instance::{InstanceKind, PowerAction},
    operation::OperationClass,
};
use serde::Serialize;
use std::{sync::Arc, time::Duration};

/// Name of the view in ETags.
const VIEW: &str = "instance";

/// What views show of an instance and changes carry back without meaning.
const READ_ONLY: &[&str] = &[
    "created_at",
    "expanded_config",
    "expanded_devices",
    "name",
    "status",
    "status_code",
    "last_used_at",
    "location",
    "type",
    "project",
    "backups",
    "state",
    "snapshots",
    "restore",
    "stateful",
    "architecture",
    "disk_only",
];

pub(super) fn views(call: &Call) -> Result<Vec<Arc<InstanceView>>> {
    let mut all = if call.query.flag("all-projects") {
        call.engine().instances_all(&call.context)
    } else {
        call.engine().instances(&call.context, call.project())?
    };
    if let Some(kind) = call.query.get("instance-type") {
        let kind = InstanceKind::parse("instance-type", kind)?;
        all.retain(|v| v.instance.kind == kind);
    }
    Ok(all)
}

fn link(view: &InstanceView) -> String {
    wire::path("instances", &view.instance.name, &view.project.name)
}

/// An object with more fields appended before its closing brace.
fn extended(json: &Bytes, more: &impl Serialize) -> Result<Bytes> {
    let mut out = Vec::with_capacity(json.len() + 1024);
    out.extend_from_slice(&json[..json.len() - 1]);
    out.push(b',');
    let start = out.len();
    serde_json::to_writer(&mut out, more)?;
    out.remove(start);
    Ok(out.into())
}

/// What recursion adds to an instance.
#[derive(Serialize)]
struct Full<'a> {
    backups: (),
    state: StateView<'a>,
    /// Null when there are none, as Incus says it.
    snapshots: Option<Vec<SnapshotView<'a>>>,
}

/// What `recursion=2;fields=…` can choose.
const COSTLY: &[&str] = &["state.disk", "state.network"];

impl<'a> Full<'a> {
    /// Leaves out what was not chosen.
    fn choose(mut self, fields: Option<&[&str]>) -> Self {
        let Some(fields) = fields else { return self };
        if !fields.contains(&"state.disk") {
            self.state.disk.clear();
        }
        if !fields.contains(&"state.network") {
            self.state.network = None;
        }
        self
    }

    fn of(records: &'a Records, view: &'a InstanceView, metrics: Option<&'a Metrics>) -> Self {
        let taken = records.snapshots_of(view.instance.id);
        let snapshots = taken.iter().map(|s| SnapshotView::of(records, s)).collect();
        let snapshots = Some(snapshots).filter(|all: &Vec<_>| !all.is_empty());
        Self { backups: (), state: StateView::of(view, metrics), snapshots }
    }
}

/// `GET /1.0/instances`
///
/// # Errors
/// Those of the engine.
pub async fn list(call: Call) -> Result<Reply> {
    let recursion = call.query.recursion()?;
    let chosen = call.query.recursion_fields(COSTLY)?;
    let filter = Filter::parse(call.query.get("filter"))?;
    let page = Page::of(&call.query)?;
    let mut all = views(&call)?;
    let total = call.engine().inner().inventory.read().instances.len();
    let mut next = None;
    if let Some(page) = &page {
        let accepts = |some: &[Arc<InstanceView>]| -> Result<Vec<bool>> {
            if filter.accepts_all() {
                return Ok(vec![true; some.len()]);
            }
            let json = call.app.render(some, total)?;
            json.iter().map(|j| Ok(filter.accepts(&serde_json::from_slice(j)?))).collect()
        };
        next = page.cut(&mut all, place, accepts)?;
    }
    let next = page::next_link(&call.query, next.as_deref())?;
    // What a page has was looked at.
    let filtered = page.is_some() || filter.accepts_all();
    if recursion == 0 && filtered {
        return Ok(page::linked(sync(&all.iter().map(|v| link(v)).collect::<Vec<_>>())?, next));
    }
    let mut json = call.app.render(&all, total)?;
    let metrics = match recursion {
        2 => Some(call.engine().all_metrics().await),
        _ => None,
    };
    if let Some(metrics) = &metrics {
        let records = call.engine().inner().inventory.read();
        json = json
            .iter()
            .zip(&all)
            .map(|(j, v)| {
                let full = Full::of(&records, v, metrics.get(&v.instance.id));
                extended(j, &full.choose(chosen.as_deref()))
            })
            .collect::<Result<_>>()?;
    }
    if !filtered {
        let accepted = json
            .iter()
            .map(|j| Ok(filter.accepts(&serde_json::from_slice(j)?)))
            .collect::<Result<Vec<bool>>>()?;
        let mut keep = accepted.iter();
        all.retain(|_| *keep.next().unwrap_or(&false));
        let mut keep = accepted.iter();
        json.retain(|_| *keep.next().unwrap_or(&false));
    }
    if recursion == 0 {
        return sync(&all.iter().map(|v| link(v)).collect::<Vec<_>>());
    }
    Ok(page::linked(array(&json), next))
}

/// Where an instance stands in pages: by project and name.
fn place(view: &InstanceView) -> (&str, &str) {
    (&*view.project.name, &*view.instance.name)
}

/// `GET /1.0/instances/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn get(call: Call) -> Result<Reply> {
    let view = call.engine().instance(&call.context, call.project(), call.param(0))?;
    let tag = Etag::of(VIEW, view.instance.id.uuid(), view.instance.spec_version);
    if call.query.recursion()? == 0 {
        return sync_etag(&Wire::of(&view), &tag);
    }
    let metrics = call.engine().instance_metrics(&call.context, call.project(), call.param(0)).await?;
    #[derive(Serialize)]
    struct Whole<'a> {
        #[serde(flatten)]
        instance: Wire<'a>,
        #[serde(flatten)]
        full: Full<'a>,
    }
    let records = call.engine().inner().inventory.read();
    let full = Full::of(&records, &view, metrics.as_ref());
    sync_etag(&Whole { instance: Wire::of(&view), full }, &tag)
}

/// `GET /1.0/instances/{name}/state`
///
/// # Errors
/// Those of the engine.
pub async fn state(call: Call) -> Result<Reply> {
    let view = call.engine().instance(&call.context, call.project(), call.param(0))?;
    let metrics = call.engine().instance_metrics(&call.context, call.project(), call.param(0)).await?;
    sync(&StateView::of(&view, metrics.as_ref()))
}

/// `POST /1.0/instances`
///
/// # Errors
/// Those of the engine; invalid by field.
pub async fn create(call: Call) -> Result<Reply> {
    if super::backups::is_upload(&call) {
        return super::backups::import_instance(call).await;
    }
    let target = call.query.get("target").filter(|t| !t.is_empty()).map(str::to_owned);
    let (call, mut f) = call.fields().await?;
    let name = f.text("name")?;
    let kind = match f.text("type")?.filter(|s| !s.is_empty()) {
        Some(s) => InstanceKind::parse("type", &s)?,
        None => match call.query.get("instance-type") {
            Some(s) => InstanceKind::parse("instance-type", s)?,
            None => InstanceKind::Container,
        },
    };
    let vmid = f.integer("vmid")?.map(|n| Vmid::chosen("vmid", n)).transpose()?;
    let far = far(&mut f, kind)?;
    let (source, original) = match (&far, copied(&mut f, &call)?) {
        (_, Some(original)) => (InstanceSource::None, Some(original)),
        (Some(_), None) => (InstanceSource::None, None),
        (None, None) => (source(&mut f, &call)?, None),
    };
    let request = CreateInstance {
        name: name.filter(|n| !n.is_empty()),
        kind,
        description: f.text("description")?.unwrap_or_default(),
        ephemeral: f.flag("ephemeral")?,
        config: f.config("config")?.unwrap_or_default(),
        devices: f.devices("devices")?.unwrap_or_default(),
        profiles: f.texts("profiles")?,
        source,
        start: f.flag("start")?,
        target,
        vmid,
    };
    if vmid.is_some() && original.as_ref().is_some_and(|o| o.refresh) {
        let text = "an instance keeps its VMID; leave it out when a copy is refreshed";
        return Err(Error::invalid("vmid", text));
    }
    if f.text("instance_type")?.is_some_and(|t| !t.is_empty()) {
        return Err(Error::invalid(
            "instance_type",
            "instance types are not known here; set limits.cpu and limits.memory",
        ));
    }
    if f.flag("stateful")? {
        return Err(Error::unsupported("stateful instances are not there yet").at("stateful"));
    }
    let architecture = f.text("architecture")?.filter(|a| !a.is_empty());
    f.text("restore")?;
    f.finish(&["disk_only"])?;
    let engine = call.engine();
    if let Some(architecture) = &architecture {
        // LXD's numbers, which pylxd and older scripts send.
        let architecture = match architecture.as_str() {
            "2" => "x86_64",
            "4" => "aarch64",
            name => name,
        };
        engine.demand_architecture(&call.context, request.target.as_deref(), architecture)?;
    }
    if let Some(far) = far {
        return running(&engine.instance_create_remote(&call.context, call.project(), request, far).await?);
    }
    let (_, operation) = match original {
        None => engine.instance_create(&call.context, call.project(), request).await?,
        Some(original) => {
            let copy = CopyInstance { copy: request, ..original };
            engine.instance_copy(&call.context, call.project(), copy).await?
        }
    };
    running(&operation)
}

/// The server of the image, when the source names one.
fn far(f: &mut Fields, kind: InstanceKind) -> Result<Option<RemoteSource>> {
    if !f.is("source", "type", "image") || f.is("source", "server", "") || !f.nested("source", "server") {
        return Ok(None);
    }
    let mut s = f.object("source")?;
    s.text("type")?;
    let mut remote = super::publish::remote(&mut s)?;
    // Its own name for it; what is launched says the kind.
    remote.from.kind = Some(kind);
    s.take("properties");
    s.finish(&[
        "allow_inconsistent",
        "base-image",
        "container_only",
        "instance_only",
        "live",
        "operation",
        "refresh",
        "refresh_exclude_older",
        "secrets",
        "source",
    ])?;
    Ok(Some(remote))
}

/// The original, when the source is one; the copy itself is filled in later.
fn copied(f: &mut Fields, call: &crate::app::Taken) -> Result<Option<CopyInstance>> {
    if !f.is("source", "type", "copy") {
        return Ok(None);
    }
    let mut s = f.object("source")?;
    s.text("type")?;
    let full = s.need_text("source")?;
    let (name, snapshot) = match full.split_once('/') {
        Some((name, snapshot)) => (name.to_owned(), Some(snapshot.to_owned())),
        None => (full, None),
    };
    let project = s.text("project")?.filter(|p| !p.is_empty());
    let instance_only = s.flag("instance_only")? | s.flag("container_only")?;
    let refresh = s.flag("refresh")?;
    let exclude_older = s.flag("refresh_exclude_older")?;
    s.finish(&[
        "allow_inconsistent",
        "base-image",
        "live",
        "mode",
        "certificate",
        "secret",
        "server",
        "protocol",
        "alias",
        "fingerprint",
        "properties",
        "operation",
        "secrets",
    ])?;
    Ok(Some(CopyInstance {
        project: project.unwrap_or_else(|| call.project().to_owned()),
        name,
        snapshot,
        instance_only,
        refresh,
        exclude_older,
        copy: CreateInstance {
            name: None,
            kind: InstanceKind::Container,
            description: String::new(),
            ephemeral: false,
            config: Default::default(),
            devices: Default::default(),
            profiles: None,
            source: InstanceSource::None,
            start: false,
            target: None,
            vmid: None,
        },
    }))
}

pub(super) fn source(f: &mut Fields, call: &crate::app::Taken) -> Result<InstanceSource> {
    if !f.has("source") {
        f.take("source");
        return Err(Error::invalid("source", "source is missing: say what the root disk begins as"));
    }
    let mut s = f.object("source")?;
    let word = s.need_text("type")?;
    let project = s.text("project")?.filter(|p| !p.is_empty());
    let source = match word.as_str() {
        "none" => InstanceSource::None,
        "image" => {
            if s.text("server")?.is_some_and(|s| !s.is_empty()) {
                let text = "the image of a server is copied first: incus image copy SERVER:IMAGE local:";
                return Err(Error::unsupported(text).at("source.server"));
            }
            let fingerprint = s.text("fingerprint")?.filter(|s| !s.is_empty());
            let alias = s.text("alias")?.filter(|s| !s.is_empty());
            let reference = match (fingerprint, alias) {
                (Some(reference), _) | (None, Some(reference)) => reference,
                (None, None) => by_properties(&mut s, call, project.as_deref().unwrap_or(call.project()))?,
            };
            match project {
                None => InstanceSource::Image(reference),
                Some(project) => InstanceSource::ImageOf { project, reference },
            }
        }
        kind @ "migration" => {
            return Err(Error::unsupported(format!("creating an instance by {kind} is not there yet"))
                .at("source.type"));
        }
        other => {
            return Err(Error::invalid(
                "source.type",
                format!("{other:?} is not a source; use \"image\", \"copy\" or \"none\""),
            ));
        }
    };
    s.text("mode")?;
    s.text("protocol")?;
    s.take("properties");
    s.finish(&[
        "certificate",
        "allow_inconsistent",
        "secret",
        "alias",
        "server",
        "fingerprint",
        "base-image",
        "source",
        "live",
        "instance_only",
        "refresh",
        "refresh_exclude_older",
        "operation",
        "secrets",
        "container_only",
    ])?;
    Ok(source)
}

/// The fingerprint of the project's newest image with all these properties.
fn by_properties(s: &mut Fields, call: &crate::app::Taken, project: &str) -> Result<String> {
    let wanted = s.config("properties")?.filter(|p| !p.is_empty()).ok_or_else(|| {
        Error::invalid(
            "source.fingerprint",
            "the image is missing: give source.fingerprint, alias or properties",
        )
    })?;
    // Newest first.
    let images = call.engine().images(&call.context, project)?;
    images
        .iter()
        .find(|i| wanted.iter().all(|(k, v)| i.properties.get(k) == Some(v)))
        .map(|i| i.fingerprint.clone())
        .ok_or_else(|| Error::not_found("no image has these properties").at("source.properties"))
}

/// `PUT /1.0/instances/{name}`
///
/// # Errors
/// Those of the engine; invalid by field.
pub async fn replace(call: Call) -> Result<Reply> {
    let view = call.engine().instance(&call.context, call.project(), call.param(0))?;
    let if_version = call.expected(VIEW, view.instance.id.uuid(), view.instance.spec_version)?;
    let (call, mut f) = call.fields().await?;
    if let Some(snapshot) = f.text("restore")?.filter(|r| !r.is_empty()) {
        let memory = f.flag("stateful")?;
        let origin = Origin::Instance { project: call.project(), name: call.param(0) };
        return super::snapshots::restore(&call, origin, &snapshot, (false, memory)).await;
    }
    let request = UpdateInstance {
        description: f.text("description")?.unwrap_or_default(),
        ephemeral: f.flag("ephemeral")?,
        config: f.config("config")?.unwrap_or_default(),
        devices: f.devices("devices")?.unwrap_or_default(),
        profiles: f.texts("profiles")?.unwrap_or_default(),
        if_version,
    };
    f.finish(READ_ONLY)?;
    let operation =
        call.engine().instance_update(&call.context, call.project(), call.param(0), request).await?;
    running(&operation)
}

/// `PATCH /1.0/instances/{name}`: what is not said stays; keys of configuration and devices are merged.
///
/// # Errors
/// Those of the engine; invalid by field.
pub async fn patch(call: Call) -> Result<Reply> {
    let view = call.engine().instance(&call.context, call.project(), call.param(0))?;
    let i = &view.instance;
    let if_version = call.expected(VIEW, i.id.uuid(), i.spec_version)?.or(Some(i.spec_version));
    let (call, mut f) = call.fields().await?;
    let mut request = UpdateInstance {
        description: i.description.clone(),
        ephemeral: i.ephemeral,
        config: i.config.clone(),
        devices: i.devices.clone(),
        profiles: view.profiles.iter().map(|p| p.name.to_string()).collect(),
        if_version,
    };
    if let Some(text) = f.text("description")? {
        request.description = text;
    }
    if f.has("ephemeral") {
        request.ephemeral = f.flag("ephemeral")?;
    }
    request.config.extend(f.config("config")?.unwrap_or_default());
    request.devices.extend(f.devices("devices")?.unwrap_or_default());
    if let Some(profiles) = f.texts("profiles")? {
        request.profiles = profiles;
    }
    f.take("ephemeral");
    f.finish(READ_ONLY)?;
    let operation =
        call.engine().instance_update(&call.context, call.project(), call.param(0), request).await?;
    // Incus answers a PATCH at once.
    crate::app::finished(&operation).await?;
    Ok(crate::respond::empty())
}

/// `POST /1.0/instances/{name}`: rename, or move to another pool or project.
///
/// # Errors
/// Those of the engine; moves to other servers are not there.
pub async fn rename(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let new = f.text("name")?.unwrap_or_default();
    let (pool, project) = (f.text("pool")?, f.text("project")?);
    let elsewhere = |t: &Option<String>| t.as_deref().is_some_and(|t| !t.is_empty());
    if f.flag("migration")? || elsewhere(&pool) || elsewhere(&project) {
        let call = &call;
        if f.flag("instance_only")? | f.flag("container_only")? {
            let text = "an instance is moved with its snapshots; delete those that are not to go with it";
            return Err(Error::unsupported(text).at("instance_only"));
        }
        if f.text("target")?.is_some_and(|t| !t.is_empty()) {
            return Err(Error::unsupported("moves to another node are not there yet").at("target"));
        }
        let request = MoveInstance {
            name: Some(new),
            pool,
            project,
            // Incus 6.0's client writes these three with capitals.
            config: f.config("config")?.or(f.config("Config")?).unwrap_or_default(),
            devices: f.devices("devices")?.or(f.devices("Devices")?).unwrap_or_default(),
            profiles: f.texts("profiles")?.or(f.texts("Profiles")?),
        };
        f.finish(&["allow_inconsistent", "live"])?;
        return running(
            &call.engine().instance_move(&call.context, call.project(), call.param(0), request).await?,
        );
    }
    f.finish(&[
        "live",
        "instance_only",
        "container_only",
        "target",
        "allow_inconsistent",
        "Config",
        "Devices",
        "Profiles",
        "config",
        "devices",
        "profiles",
    ])?;
    let old = call.param(0);
    call.engine().instance_rename(&call.context, call.project(), old, &new).await?;
    ended(&call.app, &call.context, call.project(), "Renaming instance", &new)
}

/// 202 with an operation that has ended well already: for what Incus does in the background and Karst at once.
fn ended(app: &App, context: &Context, project: &str, description: &str, name: &str) -> Result<Reply> {
    let id = app.engine.project(context, project, Permission::ProjectView)?.id;
    let new = NewOperation {
        class: OperationClass::Task,
        ..NewOperation::task(description, Some(id), "instances", wire::path("instances", name, project))
    };
    let operations = &app.engine.inner().operations;
    let live = operations.begin(context, new);
    operations.end(&live, Ok(Default::default()));
    let record = live.snapshot();
    accepted(&record.id.to_string(), &OperationView::of(&record))
}

/// `DELETE /1.0/instances/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn delete(call: Call) -> Result<Reply> {
    let result = call.engine().instance_delete(&call.context, call.project(), call.param(0)).await;
    let operation = result.map_err(|e| {
        // That it runs is the request's fault by Incus' contract (400), not a conflict; pylxd tells the two apart.
        let view = call.engine().instance(&call.context, call.project(), call.param(0));
        let runs = view.is_ok_and(|v| !v.status.is_down());
        match e.kind {
            ErrorKind::Conflict if runs => Error { kind: ErrorKind::Invalid, ..e },
            _ => e,
        }
    })?;
    running(&operation)
}

fn power(f: &mut Fields) -> Result<PowerRequest> {
    let action = match f.need_text("action")?.as_str() {
        "start" => PowerAction::Start,
        "stop" => PowerAction::Stop,
        "restart" => PowerAction::Restart,
        "freeze" => PowerAction::Freeze,
        "unfreeze" => PowerAction::Unfreeze,
        other => {
            let known = ["start", "stop", "restart", "freeze", "unfreeze"];
            let hint = karst_model::error::nearest(other, known).unwrap_or("start");
            return Err(Error::invalid(
                "action",
                format!("{other:?} is not an action; did you mean {hint:?}?"),
            ));
        }
    };
    let force = f.flag("force")?;
    // Clients say -1 for "as long as it takes".
    let timeout = match f.integer("timeout")? {
        Some(n @ 1..) => Some(Duration::from_secs(n.unsigned_abs())),
        _ => None,
    };
    let stateful = f.flag("stateful")?;
    if stateful && !matches!(action, PowerAction::Start | PowerAction::Stop) {
        return Err(Error::invalid("stateful", "memory is kept by a stop and used by a start only"));
    }
    Ok(PowerRequest { action, force, timeout, stateful })
}

/// `PUT /1.0/instances/{name}/state`
///
/// # Errors
/// Those of the engine.
pub async fn set_state(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let request = power(&mut f)?;
    f.finish(&[])?;
    if request.stateful && request.action == PowerAction::Start {
        let view = call.engine().instance(&call.context, call.project(), call.param(0))?;
        if !view.instance.stateful {
            let text = format!("no memory of instance {:?} was kept; start it without", call.param(0));
            return Err(Error::conflict(text).at("stateful"));
        }
    }
    let operation =
        call.engine().instance_power(&call.context, call.project(), call.param(0), request).await?;
    running(&operation)
}

/// `PUT /1.0/instances`: the same for all of a project.
///
/// # Errors
/// Those of the engine; the operation fails when one of them fails.
pub async fn set_state_all(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let mut state = f.object("state")?;
    let request = power(&mut state)?;
    state.finish(&[])?;
    f.finish(&[])?;
    let project = call.engine().project(&call.context, call.project(), Permission::InstanceUse)?;
    let names: Vec<String> = call
        .engine()
        .instances(&call.context, call.project())?
        .iter()
        .filter(|v| request.action.check(&v.instance.name, v.status).is_ok())
        .map(|v| v.instance.name.to_string())
        .collect();
    let paths = names.iter().map(|n| wire::path("instances", n, &project.name)).collect();
    let new = NewOperation {
        description: "Updating state of instances".into(),
        class: OperationClass::Task,
        project: Some(project.id),
        resources: [("instances".to_owned(), paths)].into(),
        may_cancel: false,
        metadata: Default::default(),
    };
    let live = call.engine().inner().operations.begin(&call.context, new);
    let answer = running(&live)?;
    tokio::spawn(async move {
        let each = names.iter().map(|name| async {
            let operation = call.engine().instance_power(&call.context, &project.name, name, request).await?;
            crate::app::finished(&operation).await
        });
        let failed: Vec<String> = futures::future::join_all(each)
            .await
            .into_iter()
            .zip(&names)
            .filter_map(|(r, n)| r.err().map(|e| format!("{n}: {e}")))
            .collect();
        let result = match failed.is_empty() {
            true => Ok(Default::default()),
            false => Err(Error::conflict(failed.join("; "))),
        };
        call.engine().inner().operations.end(&live, result);
    });
    Ok(answer)
}
