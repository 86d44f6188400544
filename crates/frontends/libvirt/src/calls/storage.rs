//! Pools and volumes. A volume's key is its UUID, its path the names of pool and volume: where it lies on the host's disks
//! is the host's affair.

use super::{Answered, Named, flag, int, listed, names as some_names, text};
use crate::{
    error::{Code, Part, VirError},
    session::Call,
    xdr::{Reader, Writer},
    xml,
};
use karst_engine::Row;
use karst_model::storage::{Pool, PoolKind, Usage, Volume, VolumeContent, VolumeOwner};

fn no_pool(text: String) -> VirError {
    VirError::new(Code::NoStoragePool, Part::Storage, text)
}

fn no_volume(text: String) -> VirError {
    VirError::new(Code::NoStorageVol, Part::Storage, text)
}

pub(super) fn pools(call: &Call) -> Result<Vec<Row<Pool>>, VirError> {
    let session = &call.session;
    Ok(session.front.engine.pools(&session.context)?)
}

pub(super) fn find(call: &Call, name: &str) -> Result<Row<Pool>, VirError> {
    let found = pools(call)?.into_iter().find(|p| &*p.name == name);
    found.ok_or_else(|| no_pool(format!("no storage pool with matching name '{name}'")))
}

pub(super) fn find_uuid(call: &Call, uuid: uuid::Uuid) -> Result<Row<Pool>, VirError> {
    let found = pools(call)?.into_iter().find(|p| p.id.uuid() == uuid);
    found.ok_or_else(|| no_pool(format!("no storage pool with matching uuid '{uuid}'")))
}

fn only(call: &Call) -> Result<Row<Pool>, VirError> {
    find_uuid(call, call.arguments(Named::read)?.uuid)
}

fn write_pool(w: &mut Writer, pool: &Pool) {
    w.string(&pool.name).uuid(pool.id.uuid());
}

pub(super) fn one(pool: &Pool) -> Answered {
    let mut w = Writer::new();
    write_pool(&mut w, pool);
    Ok(w.finish().into())
}

/// What is in a pool is there for those who ask when it is active.
pub(super) fn demand_active(pool: &Pool) -> Result<(), VirError> {
    match pool.life.stopped {
        false => Ok(()),
        true => {
            let text = format!("storage pool '{}' is not active", &*pool.name);
            Err(VirError::new(Code::OperationInvalid, Part::Storage, text))
        }
    }
}

/// One that is not active shows none.
async fn usage(call: &Call, pool: &Pool) -> Result<Usage, VirError> {
    if pool.life.stopped {
        return Ok(Usage::default());
    }
    let session = &call.session;
    Ok(session.front.engine.pool_usage(&session.context, &pool.name).await?)
}

/// `VIR_CONNECT_LIST_STORAGE_POOLS_*`: what pools are, in pairs of which none says nothing.
const INACTIVE: u32 = 0x1;
const ACTIVE: u32 = 0x2;
const PERSISTENT: u32 = 0x4;
const TRANSIENT: u32 = 0x8;
const AUTOSTART: u32 = 0x10;
const NO_AUTOSTART: u32 = 0x20;
/// Where the kinds begin.
const KINDS: u32 = 6;

fn is_wanted(pool: &Pool, flags: u32) -> bool {
    let life = pool.life;
    let pairs = [
        (life.stopped, INACTIVE, ACTIVE),
        (life.transient, TRANSIENT, PERSISTENT),
        (life.manual, NO_AUTOSTART, AUTOSTART),
    ];
    let fits =
        |(is, yes, no): (bool, u32, u32)| flags & (yes | no) == 0 || flags & (if is { yes } else { no }) != 0;
    // Their order is not that of the kinds' numbers.
    let kind = match pool.kind {
        PoolKind::Dir => 0,
        PoolKind::Btrfs => 1,
        PoolKind::Lvm => 3,
        PoolKind::Zfs => 11,
    };
    let kinds = flags >> KINDS;
    pairs.into_iter().all(fits) && (kinds == 0 || kinds & (1 << kind) != 0)
}

/// `CONNECT_LIST_ALL_STORAGE_POOLS`
pub async fn list(call: Call) -> Answered {
    let (need_results, flags) = call.arguments(|r| Ok((r.i32()?, r.u32()?)))?;
    call.known_flags(flags, 0xf_ffff)?;
    let found = pools(&call)?.into_iter().filter(|p| is_wanted(p, flags)).collect();
    listed(found, need_results, |w, pool: Row<Pool>| write_pool(w, &pool))
}

fn those(call: &Call, flags: u32) -> Result<Vec<Row<Pool>>, VirError> {
    Ok(pools(call)?.into_iter().filter(|p| is_wanted(p, flags)).collect())
}

/// `CONNECT_NUM_OF_STORAGE_POOLS`
pub async fn count(call: Call) -> Answered {
    Ok(int(those(&call, ACTIVE)?.len() as i32))
}

/// `CONNECT_NUM_OF_DEFINED_STORAGE_POOLS`: those that are not active.
pub async fn count_defined(call: Call) -> Answered {
    Ok(int(those(&call, INACTIVE)?.len() as i32))
}

/// `CONNECT_LIST_STORAGE_POOLS`
pub async fn names(call: Call) -> Answered {
    let max = call.arguments(|r| r.i32())?;
    some_names(those(&call, ACTIVE)?.iter().map(|p| &*p.name), max)
}

/// `CONNECT_LIST_DEFINED_STORAGE_POOLS`
pub async fn defined_names(call: Call) -> Answered {
    let max = call.arguments(|r| r.i32())?;
    some_names(those(&call, INACTIVE)?.iter().map(|p| &*p.name), max)
}

/// `STORAGE_POOL_LOOKUP_BY_NAME`
pub async fn by_name(call: Call) -> Answered {
    one(&*find(&call, &call.arguments(|r| r.string())?)?)
}

/// `STORAGE_POOL_LOOKUP_BY_UUID`
pub async fn by_uuid(call: Call) -> Answered {
    one(&*find_uuid(&call, call.arguments(|r| r.uuid())?)?)
}

/// `STORAGE_POOL_LOOKUP_BY_TARGET_PATH`
pub async fn by_target(call: Call) -> Answered {
    let (path, flags) = call.arguments(|r| Ok((r.string()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let name = path.trim_end_matches('/').strip_prefix("/karst/");
    let missing = || no_pool(format!("no storage pool with matching target path '{path}'"));
    one(&*find(&call, name.ok_or_else(missing)?).map_err(|_| missing())?)
}

/// `STORAGE_POOL_LOOKUP_BY_VOLUME`
pub async fn by_volume(call: Call) -> Answered {
    let named = call.arguments(VolumeName::read)?;
    one(&*find(&call, &named.pool)?)
}

/// `STORAGE_POOL_GET_INFO`
pub async fn info(call: Call) -> Answered {
    let pool = only(&call)?;
    let usage = usage(&call, &pool).await?;
    let mut w = Writer::new();
    // virStoragePoolState: inactive, running.
    w.u32(if pool.life.stopped { 0 } else { 2 })
        .u64(usage.total)
        .u64(usage.used)
        .u64(usage.total.saturating_sub(usage.used));
    Ok(w.finish().into())
}

/// `STORAGE_POOL_GET_XML_DESC`
pub async fn xml(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((Named::read(r)?, r.u32()?)))?;
    call.known_flags(flags, 1)?;
    let pool = find_uuid(&call, named.uuid)?;
    let usage = usage(&call, &pool).await?;
    Ok(text(&xml::storage::pool(&pool, usage)))
}

/// `STORAGE_POOL_GET_AUTOSTART`
pub async fn autostart(call: Call) -> Answered {
    Ok(flag(!only(&call)?.life.manual))
}

/// `STORAGE_POOL_IS_ACTIVE`
pub async fn is_active(call: Call) -> Answered {
    Ok(flag(!only(&call)?.life.stopped))
}

/// `STORAGE_POOL_IS_PERSISTENT`
pub async fn is_persistent(call: Call) -> Answered {
    Ok(flag(!only(&call)?.life.transient))
}

/// A volume as clients name it.
pub(super) struct VolumeName {
    pool: String,
    name: String,
    key: String,
}

impl VolumeName {
    pub(super) fn read(r: &mut Reader<'_>) -> Result<Self, VirError> {
        Ok(Self { pool: r.string()?, name: r.string()?, key: r.string()? })
    }
}

/// A volume with the names of its pool and its own: an instance's has the instance's, apart from those that users make, so that
/// a name and a path are of one volume.
pub(super) struct Found {
    pub(super) pool: String,
    pub(super) name: String,
    pub(super) volume: Row<Volume>,
}

impl Found {
    fn write(&self, w: &mut Writer) {
        w.string(&self.pool).string(&self.name).string(&self.volume.id.to_string());
    }

    pub(super) fn answer(&self) -> Answered {
        let mut w = Writer::new();
        self.write(&mut w);
        Ok(w.finish().into())
    }

    /// Path of it in libvirt's sense: unique, and nothing of the host's.
    fn path(&self) -> String {
        format!("/karst/{}/{}", self.pool, self.name)
    }
}

/// Those of the connection's project that are disks of instances or made by users.
pub(super) fn volumes_of(call: &Call, pool: &Pool) -> Result<Vec<Found>, VirError> {
    let session = &call.session;
    let project = &session.opened()?.project;
    let all = session.front.engine.volumes(&session.context, &pool.name, Some(project))?;
    let records = session.front.engine.inner().inventory.read();
    let name = |volume: &Volume| match &volume.owner {
        VolumeOwner::Image { .. } => None,
        VolumeOwner::Custom => Some(volume.name.clone()),
        VolumeOwner::Instance { instance } => {
            Some(xml::machine::owned(&records.instances.get(instance)?.name))
        }
    };
    let with =
        |volume: Row<Volume>| Some(Found { pool: pool.name.to_string(), name: name(&volume)?, volume });
    let mut shown: Vec<_> = all.into_iter().filter_map(with).collect();
    shown.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(shown)
}

fn all_volumes(call: &Call) -> Result<Vec<Found>, VirError> {
    let mut all = vec![];
    for pool in those(call, ACTIVE)? {
        all.extend(volumes_of(call, &pool)?);
    }
    Ok(all)
}

pub(super) fn volume(call: &Call, named: &VolumeName) -> Result<Found, VirError> {
    let pool = find(call, &named.pool)?;
    demand_active(&pool)?;
    let mut all = volumes_of(call, &pool)?.into_iter();
    let found = all.find(|f| f.volume.id.to_string() == named.key);
    found.ok_or_else(|| no_volume(format!("no storage vol with matching name '{}'", named.name)))
}

pub(super) fn by_path(call: &Call, path: &str) -> Result<Found, VirError> {
    let found = all_volumes(call)?.into_iter().find(|f| f.path() == path);
    found.ok_or_else(|| no_volume(format!("no storage vol with matching path '{path}'")))
}

/// `STORAGE_POOL_LIST_ALL_VOLUMES`
pub async fn volumes(call: Call) -> Answered {
    let (named, need_results, flags) = call.arguments(|r| Ok((Named::read(r)?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let pool = find_uuid(&call, named.uuid)?;
    demand_active(&pool)?;
    listed(volumes_of(&call, &pool)?, need_results, |w, found| found.write(w))
}

/// `STORAGE_POOL_NUM_OF_VOLUMES`
pub async fn count_volumes(call: Call) -> Answered {
    let pool = only(&call)?;
    demand_active(&pool)?;
    Ok(int(volumes_of(&call, &pool)?.len() as i32))
}

/// `STORAGE_POOL_LIST_VOLUMES`
pub async fn volume_names(call: Call) -> Answered {
    let (named, max) = call.arguments(|r| Ok((Named::read(r)?, r.i32()?)))?;
    let pool = find_uuid(&call, named.uuid)?;
    demand_active(&pool)?;
    let all = volumes_of(&call, &pool)?;
    some_names(all.iter().map(|f| f.name.as_str()), max)
}

/// `STORAGE_VOL_LOOKUP_BY_NAME`
pub async fn volume_by_name(call: Call) -> Answered {
    let (named, name) = call.arguments(|r| Ok((Named::read(r)?, r.string()?)))?;
    let pool = find_uuid(&call, named.uuid)?;
    demand_active(&pool)?;
    let found = volumes_of(&call, &pool)?.into_iter().find(|f| f.name == name);
    found.ok_or_else(|| no_volume(format!("no storage vol with matching name '{name}'")))?.answer()
}

/// `STORAGE_VOL_LOOKUP_BY_KEY`
pub async fn volume_by_key(call: Call) -> Answered {
    let key = call.arguments(|r| r.string())?;
    let found = all_volumes(&call)?.into_iter().find(|f| f.volume.id.to_string() == key);
    found.ok_or_else(|| no_volume(format!("no storage vol with matching key {key}")))?.answer()
}

/// `STORAGE_VOL_LOOKUP_BY_PATH`
pub async fn volume_by_path(call: Call) -> Answered {
    let path = call.arguments(|r| r.string())?;
    by_path(&call, &path)?.answer()
}

/// `virStorageVolType`: a file, or a directory.
fn kind(volume: &Volume) -> i32 {
    match volume.content {
        VolumeContent::Block | VolumeContent::Iso => 0,
        VolumeContent::Filesystem => 2,
    }
}

async fn sizes(call: &Call, found: &Found) -> Result<(u64, u64), VirError> {
    let usage = call.session.front.engine.volume_usage(&found.volume).await?;
    let capacity = found.volume.size.map_or(usage.total.max(usage.used), |s| s.bytes());
    Ok((capacity, usage.used))
}

/// `STORAGE_VOL_GET_INFO`
pub async fn volume_info(call: Call) -> Answered {
    let found = volume(&call, &call.arguments(VolumeName::read)?)?;
    let (capacity, allocation) = sizes(&call, &found).await?;
    let mut w = Writer::new();
    w.i32(kind(&found.volume)).u64(capacity).u64(allocation);
    Ok(w.finish().into())
}

/// `STORAGE_VOL_GET_INFO_FLAGS`
pub async fn volume_info_flags(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((VolumeName::read(r)?, r.u32()?)))?;
    // 1: the size of the file instead of what it takes.
    call.known_flags(flags, 1)?;
    let found = volume(&call, &named)?;
    let (capacity, allocation) = sizes(&call, &found).await?;
    let mut w = Writer::new();
    w.i32(kind(&found.volume)).u64(capacity).u64(allocation);
    Ok(w.finish().into())
}

/// `STORAGE_VOL_GET_XML_DESC`
pub async fn volume_xml(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((VolumeName::read(r)?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let found = volume(&call, &named)?;
    let (capacity, allocation) = sizes(&call, &found).await?;
    Ok(text(&xml::storage::volume(&found.volume, &found.name, &found.path(), capacity, allocation)))
}

/// `STORAGE_VOL_GET_PATH`
pub async fn volume_path(call: Call) -> Answered {
    let found = volume(&call, &call.arguments(VolumeName::read)?)?;
    Ok(text(&found.path()))
}
