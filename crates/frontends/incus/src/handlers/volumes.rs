//! Volumes of pools: `/1.0/storage-pools/{name}/volumes`. Custom ones are changed here; those of instances and images are
//! shown only.

use super::list as respond_list;
use crate::{
    app::{Call, Taken, finished, running},
    fields::Fields,
    filter::Filter,
    respond::{Etag, Reply, created, empty, sync, sync_etag},
    wire::{
        self, NOWHERE,
        misc::{UsedTotal, VolumeView},
    },
};
use karst_engine::{
    Row,
    snapshots::Origin,
    volumes::{copy::CopyVolume, create::CreateVolume, relocate::MoveVolume, update::UpdateVolume, users},
};
use karst_model::{
    Error, Result,
    storage::{Volume, VolumeContent, VolumeOwner},
};
use serde::Serialize;

const VIEW: &str = "storage-volume";

/// What views show of a volume and changes carry back without meaning.
const READ_ONLY: &[&str] =
    &["name", "type", "used_by", "location", "content_type", "project", "created_at", "pool"];

fn tag(volume: &Volume) -> Etag {
    Etag::of(VIEW, volume.id.uuid(), volume.spec_version)
}

struct Found {
    volume: Row<Volume>,
    kind: &'static str,
    name: String,
    project: String,
    used_by: Vec<String>,
}

/// Volumes of a pool as Incus shows them: those of instances under the instance's name and type.
fn volumes_of(call: &Call) -> Result<Vec<Found>> {
    let project = (!call.query.flag("all-projects")).then(|| call.project());
    let all = call.engine().volumes(&call.context, call.param(0), project)?;
    let inner = call.engine().inner();
    let records = inner.inventory.read();
    let mut found: Vec<_> = all
        .into_iter()
        .map(|volume| {
            let project =
                records.projects.get(&volume.project).map(|p| p.name.to_string()).unwrap_or_default();
            let (kind, name, used_by) = match &volume.owner {
                VolumeOwner::Instance { instance } => match records.instances.get(instance) {
                    Some(i) => (
                        i.kind.as_str(),
                        i.name.to_string(),
                        vec![wire::path("instances", &i.name, &project)],
                    ),
                    None => ("container", volume.name.clone(), vec![]),
                },
                VolumeOwner::Image { image } => {
                    let name = records
                        .images
                        .get(image)
                        .map_or_else(|| volume.name.clone(), |i| i.fingerprint.clone());
                    ("image", name, vec![])
                }
                VolumeOwner::Custom => {
                    let used_by = users(&records, &volume).visible_to(&call.context).paths(&records);
                    ("custom", volume.name.clone(), used_by)
                }
            };
            Found { volume, kind, name, project, used_by }
        })
        .collect();
    found.sort_by(|a, b| (a.kind, &a.name, &a.project).cmp(&(b.kind, &b.name, &b.project)));
    Ok(found)
}

impl Found {
    fn view(&self) -> VolumeView<'_> {
        let mut config = self.volume.config.clone();
        if let Some(size) = self.volume.size {
            config.entry("size".into()).or_insert_with(|| size.to_string());
        }
        VolumeView {
            config,
            description: &self.volume.description,
            name: &self.name,
            kind: self.kind,
            used_by: self.used_by.clone(),
            location: NOWHERE,
            content_type: self.volume.content.as_str(),
            project: &self.project,
            created_at: self.volume.created_at,
        }
    }

    fn path(&self, pool: &str) -> String {
        let kind = format!("storage-pools/{}/volumes/{}", wire::segment(pool), self.kind);
        wire::path(&kind, &self.name, &self.project)
    }
}

/// `GET /1.0/storage-pools/{name}/volumes` and `…/volumes/{type}`
///
/// # Errors
/// Those of the engine.
pub async fn list(call: Call) -> Result<Reply> {
    let recursion = call.query.recursion()?;
    let filter = Filter::parse(call.query.get("filter"))?;
    let mut all = volumes_of(&call)?;
    let kind = call.param(1);
    if !kind.is_empty() {
        known_kind(kind)?;
        all.retain(|v| v.kind == kind);
    }
    respond_list(recursion, &filter, all.iter().map(|v| (v.view(), v.path(call.param(0)))))
}

fn known_kind(kind: &str) -> Result<()> {
    if ["container", "virtual-machine", "image", "custom"].contains(&kind) {
        return Ok(());
    }
    Err(Error::invalid(
        "type",
        format!("{kind:?} is not a type of volume; use container, virtual-machine, image or custom"),
    ))
}

fn find(call: &Call) -> Result<Found> {
    let (kind, name) = (call.param(1), call.param(2));
    known_kind(kind)?;
    volumes_of(call)?.into_iter().find(|v| v.kind == kind && v.name == name).ok_or_else(|| {
        Error::not_found(format!("storage volume {kind}/{name} not found in pool {:?}", call.param(0)))
    })
}

/// `GET /1.0/storage-pools/{name}/volumes/{type}/{volume}`
///
/// # Errors
/// Those of the engine.
pub async fn get(call: Call) -> Result<Reply> {
    let found = find(&call)?;
    sync_etag(&found.view(), &tag(&found.volume))
}

/// `GET /1.0/storage-pools/{name}/volumes/{type}/{volume}/state`
///
/// # Errors
/// Those of the engine.
pub async fn state(call: Call) -> Result<Reply> {
    #[derive(Serialize)]
    struct State {
        usage: UsedTotal,
    }
    let found = find(&call)?;
    let usage = call.engine().volume_usage(&found.volume).await?;
    sync(&State { usage: UsedTotal { used: usage.used, total: usage.total } })
}

fn content(name: &str) -> Result<VolumeContent> {
    match name {
        "" | "filesystem" => Ok(VolumeContent::Filesystem),
        "block" => Ok(VolumeContent::Block),
        other => Err(Error::invalid(
            "content_type",
            format!("{other:?} is not a content of volumes that can be made; use filesystem or block"),
        )),
    }
}

/// Only custom volumes can be made or changed by themselves.
pub(super) fn demand_custom(kind: &str) -> Result<()> {
    known_kind(kind)?;
    if kind == "custom" {
        return Ok(());
    }
    Err(Error::invalid(
        "type",
        format!("a volume of type {kind:?} follows its owner; custom ones can be changed"),
    ))
}

/// `POST /1.0/storage-pools/{name}/volumes` and `…/volumes/{type}`
///
/// # Errors
/// Those of the engine; invalid by field.
pub async fn create(call: Call) -> Result<Reply> {
    if super::backups::is_upload(&call) {
        return super::backups::import_volume(call).await;
    }
    let (call, mut f) = call.fields().await?;
    let kind = f.text("type")?.filter(|k| !k.is_empty());
    let kind = match call.param(1) {
        "" => kind.unwrap_or_else(|| "custom".into()),
        kind => kind.to_owned(),
    };
    demand_custom(&kind)?;
    let name = f.need_text("name")?;
    let content_type = f.text("content_type")?.unwrap_or_default();
    let description = f.text("description")?.unwrap_or_default();
    let config = f.config("config")?.unwrap_or_default();
    let source = f.object("source")?;
    let original = copied(source, call.project())?;
    f.finish(&["restore", "pool"])?;
    let content = content(&content_type)?;
    let request = CreateVolume { name: name.clone(), content, description, config };
    let (project, pool) = (call.project(), call.param(0));
    if let Some(mut original) = original {
        original.copy = request;
        return running(&call.engine().volume_copy(&call.context, project, pool, original).await?);
    }
    let operation = call.engine().volume_create(&call.context, project, pool, request).await?;
    finished(&operation).await?;
    created(&location(&call, &name))
}

/// The original, when the source is one; the copy itself is filled in later.
fn copied(mut source: Fields, project: &str) -> Result<Option<CopyVolume>> {
    let kind = source.text("type")?.filter(|k| !k.is_empty() && k != "none");
    let Some(kind) = kind else {
        // Clients send all that they know, empty.
        source.finish(&[
            "name",
            "pool",
            "project",
            "volume_only",
            "refresh",
            "refresh_exclude_older",
            "mode",
            "location",
            "certificate",
            "operation",
            "secrets",
        ])?;
        return Ok(None);
    };
    if kind != "copy" {
        return Err(
            Error::unsupported(format!("making a volume by {kind} is not there yet")).at("source.type")
        );
    }
    let full = source.need_text("name")?;
    let (name, snapshot) = match full.split_once('/') {
        Some((name, snapshot)) => (name.to_owned(), Some(snapshot.to_owned())),
        None => (full, None),
    };
    let pool = source.need_text("pool")?;
    let origin = source.text("project")?.filter(|p| !p.is_empty());
    let volume_only = source.flag("volume_only")?;
    let refresh = source.flag("refresh")?;
    let exclude_older = source.flag("refresh_exclude_older")?;
    source.finish(&["mode", "location", "certificate", "operation", "secrets"])?;
    Ok(Some(CopyVolume {
        project: origin.unwrap_or_else(|| project.to_owned()),
        pool,
        name,
        snapshot,
        volume_only,
        refresh,
        exclude_older,
        copy: CreateVolume {
            name: String::new(),
            content: VolumeContent::Filesystem,
            description: String::new(),
            config: Default::default(),
        },
    }))
}

fn location(call: &Taken, name: &str) -> String {
    let kind = format!("storage-pools/{}/volumes/custom", wire::segment(call.param(0)));
    wire::path(&kind, name, call.project())
}

/// What a change says, over what is there.
fn update(f: &mut Fields, now: &Volume, merge: bool, if_version: Option<u64>) -> Result<UpdateVolume> {
    let mut request = UpdateVolume { description: String::new(), config: Default::default(), if_version };
    if merge {
        request.description = now.description.clone();
        request.config = now.config.clone();
    }
    if let Some(text) = f.text("description")? {
        request.description = text;
    }
    let config = f.config("config")?;
    match (merge, config) {
        (true, config) => request.config.extend(config.unwrap_or_default()),
        (false, Some(config)) => request.config = config,
        // As much as not said: a body with a description alone leaves the configuration.
        (false, None) => request.config = now.config.clone(),
    }
    Ok(request)
}

async fn change(call: Call, merge: bool) -> Result<Reply> {
    demand_custom(call.param(1))?;
    let volume = call.engine().custom_volume(&call.context, call.project(), call.param(0), call.param(2))?;
    let if_version = call.expected(VIEW, volume.id.uuid(), volume.spec_version)?;
    let (call, mut f) = call.fields().await?;
    if let Some(snapshot) = f.text("restore")?.filter(|r| !r.is_empty()) {
        let (project, pool, name) = (call.project(), call.param(0), call.param(2));
        let origin = Origin::Volume { project, pool, name };
        return super::snapshots::restore(&call, origin, &snapshot, (true, false)).await;
    }
    let request = update(&mut f, &volume, merge, if_version.or(merge.then_some(volume.spec_version)))?;
    f.finish(READ_ONLY)?;
    let (pool, name) = (call.param(0), call.param(2));
    let operation = call.engine().volume_update(&call.context, call.project(), pool, name, request).await?;
    finished(&operation).await?;
    Ok(empty())
}

/// `PUT /1.0/storage-pools/{name}/volumes/{type}/{volume}`
///
/// # Errors
/// Those of the engine; invalid by field.
pub async fn replace(call: Call) -> Result<Reply> {
    change(call, false).await
}

/// `PATCH /1.0/storage-pools/{name}/volumes/{type}/{volume}`: what is not said stays.
///
/// # Errors
/// Those of the engine; invalid by field.
pub async fn patch(call: Call) -> Result<Reply> {
    change(call, true).await
}

/// `POST /1.0/storage-pools/{name}/volumes/{type}/{volume}`: another name, pool or project.
///
/// # Errors
/// Those of the engine; invalid by field.
pub async fn rename(call: Call) -> Result<Reply> {
    demand_custom(call.param(1))?;
    let (call, mut f) = call.fields().await?;
    let new = f.need_text("name")?;
    let (pool, project) = (f.text("pool")?, f.text("project")?);
    if f.flag("migration")? {
        return Err(Error::unsupported("moving volumes between servers is not there yet").at("migration"));
    }
    f.finish(&["target", "source", "volume_only"])?;
    let said = |text: &Option<String>, now: &str| text.as_deref().is_some_and(|t| !t.is_empty() && t != now);
    if said(&pool, call.param(0)) || said(&project, call.project()) {
        let request = MoveVolume { name: Some(new), pool, project };
        let (pool, old) = (call.param(0), call.param(2));
        let moved = call.engine().volume_move(&call.context, call.project(), pool, old, request).await?;
        return running(&moved);
    }
    let (pool, old) = (call.param(0), call.param(2));
    call.engine().volume_rename(&call.context, call.project(), pool, old, &new).await?;
    created(&location(&call, &new))
}

/// `POST /1.0/storage-pools/{name}/volumes/{type}/{volume}/rebuild`: it is empty then.
///
/// # Errors
/// Those of the engine.
pub async fn rebuild(call: Call) -> Result<Reply> {
    demand_custom(call.param(1))?;
    let (call, f) = call.fields().await?;
    f.finish(&[])?;
    let (pool, name) = (call.param(0), call.param(2));
    running(&call.engine().volume_wipe(&call.context, call.project(), pool, name).await?)
}

/// `DELETE /1.0/storage-pools/{name}/volumes/{type}/{volume}`
///
/// # Errors
/// Those of the engine.
pub async fn delete(call: Call) -> Result<Reply> {
    demand_custom(call.param(1))?;
    let (pool, name) = (call.param(0), call.param(2));
    let operation = call.engine().volume_delete(&call.context, call.project(), pool, name).await?;
    finished(&operation).await?;
    Ok(empty())
}
