//! `/1.0/storage-pools` and their volumes.

use super::list as respond_list;
use crate::{
    app::{Call, finished},
    filter::Filter,
    respond::{Etag, Reply, created, empty, sync, sync_etag},
    wire::{
        self, NOWHERE,
        misc::{PoolResources, PoolView, UsedTotal, VolumeView},
    },
};
use karst_engine::{Row, storage::CreatePool};
use karst_model::{
    Error, Result,
    instance::InstanceKind,
    storage::{Volume, VolumeOwner},
};
use serde::Serialize;

const VIEW: &str = "storage-pool";
const VOLUME_VIEW: &str = "storage-volume";

/// `GET /1.0/storage-pools`
///
/// # Errors
/// Those of the engine.
pub async fn list(call: Call) -> Result<Reply> {
    let recursion = call.query.recursion()?;
    let filter = Filter::parse(call.query.get("filter"))?;
    let all = call.engine().pools(&call.context)?;
    respond_list(
        recursion,
        &filter,
        all.iter().map(|p| {
            let path = format!("/1.0/storage-pools/{}", wire::segment(&p.name));
            (PoolView::of(p, call.engine().pool_used_by(&call.context, p)), path)
        }),
    )
}

/// `GET /1.0/storage-pools/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn get(call: Call) -> Result<Reply> {
    let pool = call.engine().pool(&call.context, call.param(0))?;
    let view = PoolView::of(&pool, call.engine().pool_used_by(&call.context, &pool));
    sync_etag(&view, &Etag::of(VIEW, pool.id.uuid(), pool.spec_version))
}

/// `GET /1.0/storage-pools/{name}/resources`
///
/// # Errors
/// Those of the engine.
pub async fn resources(call: Call) -> Result<Reply> {
    let usage = call.engine().pool_usage(&call.context, call.param(0)).await?;
    sync(&PoolResources {
        space: UsedTotal { used: usage.used, total: usage.total },
        inodes: UsedTotal { used: usage.inodes_used, total: usage.inodes_total },
    })
}

/// `POST /1.0/storage-pools`
///
/// # Errors
/// Those of the engine.
pub async fn create(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let request = CreatePool {
        name: f.need_text("name")?,
        driver: f.need_text("driver")?,
        description: f.text("description")?.unwrap_or_default(),
        config: f.config("config")?.unwrap_or_default(),
    };
    f.finish(&[])?;
    let name = request.name.clone();
    let operation = call.engine().pool_create(&call.context, request).await?;
    finished(&operation).await?;
    created(&format!("/1.0/storage-pools/{}", wire::segment(&name)))
}

/// `DELETE /1.0/storage-pools/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn delete(call: Call) -> Result<Reply> {
    let operation = call.engine().pool_delete(&call.context, call.param(0)).await?;
    finished(&operation).await?;
    Ok(empty())
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
    Ok(all
        .into_iter()
        .map(|volume| {
            let project =
                records.projects.get(&volume.project).map(|p| p.name.to_string()).unwrap_or_default();
            let (kind, name, used_by) = match &volume.owner {
                VolumeOwner::Instance { instance } => match records.instances.get(instance) {
                    Some(i) => (
                        kind_word(i.kind),
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
                VolumeOwner::Custom => ("custom", volume.name.clone(), vec![]),
            };
            Found { volume, kind, name, project, used_by }
        })
        .collect())
}

fn kind_word(kind: InstanceKind) -> &'static str {
    kind.as_str()
}

impl Found {
    fn view(&self) -> VolumeView<'_> {
        let mut config = self.volume.config.clone();
        if let Some(size) = self.volume.size {
            config.entry("size".into()).or_insert_with(|| size.to_string());
        }
        VolumeView {
            config,
            description: "",
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
pub async fn volumes(call: Call) -> Result<Reply> {
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
pub async fn volume(call: Call) -> Result<Reply> {
    let found = find(&call)?;
    sync_etag(&found.view(), &Etag::of(VOLUME_VIEW, found.volume.id.uuid(), 0))
}

/// `GET /1.0/storage-pools/{name}/volumes/{type}/{volume}/state`
///
/// # Errors
/// Those of the engine.
pub async fn volume_state(call: Call) -> Result<Reply> {
    #[derive(Serialize)]
    struct State {
        usage: UsedTotal,
    }
    let found = find(&call)?;
    let usage = call.engine().volume_usage(&found.volume).await?;
    sync(&State { usage: UsedTotal { used: usage.used, total: usage.total } })
}
