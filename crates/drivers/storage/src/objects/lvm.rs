//! LVM: thin volumes of a thin pool, trees on a file system of their own.
//!
//! Thin snapshots do not depend on what they were made of. What a volume holds stands in its tags, and whose it is too: a
//! volume group and even a thin pool may be shared with others.

use super::{
    Hold, Object, ObjectPool,
    backend::{Backend, FileSystem, Kept, PATIENCE, done, until},
};
use async_trait::async_trait;
use karst_host::{Program, run, sandbox::Launcher};
use karst_model::{
    ByteSize, Error, Result,
    storage::{PoolKind, Usage, VolumeContent},
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};
use uuid::Uuid;

/// Size of a tree without one; it takes only what is written.
const USUAL: ByteSize = ByteSize::gib(10);
/// Size of the file system of descriptions, of which the same holds.
const TEXTS: ByteSize = ByteSize::gib(1);

/// Where a pool of LVM is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LvmPlace {
    /// Volume group.
    pub group: String,
    /// Thin pool in it.
    pub thin_pool: String,
    /// Marks what is this pool's among the volumes of the group.
    pub id: Uuid,
}

#[derive(Debug)]
struct Lvm {
    place: LvmPlace,
    on: FileSystem,
    /// Bytes of an extent of the group, in which volumes are measured.
    extent: u64,
}

/// LVM's own extents, where nothing is made.
const EXTENT: u64 = 4 << 20;

/// Opens the pool in a volume group that is there; the thin pool is made of the group's free space when it is not there.
/// `root` is a directory for mounts.
///
/// # Errors
/// The program is missing, or LVM refuses.
pub async fn open(
    place: LvmPlace,
    root: impl Into<PathBuf>,
    on: FileSystem,
    worker: Launcher,
    hold: Arc<Hold>,
) -> Result<ObjectPool> {
    let thin = format!("{}/{}", place.group, place.thin_pool);
    let found = lvm(["lvs", "--noheadings", "-o", "lv_attr", &thin]).output().await?;
    if found.code != 0 {
        let tag = place.tag();
        // What is given out is cleared: no guest reads what another wrote.
        let args = ["lvcreate", "--type", "thin-pool", "-l", "100%FREE", "-Zy", "--addtag", &tag];
        done(place.command(args).args(["-n", &place.thin_pool, &place.group])).await?;
    } else {
        check_pool(&place, String::from_utf8_lossy(&found.stdout).trim())?;
    }
    // One that is set so already would be an error to the tool: it is not selected.
    let own = format!("tags={{{}}} && lv_when_full=queue", place.tag());
    // Errors at once when it is full: a machine is paused then, rather than everybody hung for a minute.
    done(place.command(["lvchange", "--errorwhenfull", "y", "-S", &own, &thin])).await?;
    done(place.command(["lvchange", "-ay", "-K", &thin])).await?;
    let extent = ["vgs", "--noheadings", "--nosuffix", "--units", "b", "-o", "vg_extent_size", &place.group];
    let extent = done(lvm(extent)).await?.trim().parse::<u64>().ok().filter(|n| *n > 0).unwrap_or(EXTENT);
    let backend = Lvm { place, on, extent };
    // After a start of the machine a group of ours is there, but not active.
    let all: Vec<_> = backend.rows().await?.into_iter().map(|(object, _, _)| backend.name(object)).collect();
    for part in all.chunks(64) {
        done(backend.place.command(["lvchange", "-ay", "-K"]).args(part)).await?;
    }
    ObjectPool::open(root.into(), Arc::new(backend), worker, hold).await
}

/// Opens a pool that is there to look at what it has; nothing of it changes but that its descriptions are active.
///
/// # Errors
/// The program is missing, or there is no such pool.
pub async fn look(
    place: LvmPlace,
    root: impl Into<PathBuf>,
    worker: Launcher,
    hold: Arc<Hold>,
) -> Result<ObjectPool> {
    let thin = format!("{}/{}", place.group, place.thin_pool);
    done(lvm(["lvs", "--noheadings", "-o", "lv_attr", &thin])).await?;
    let backend = Lvm { place, on: FileSystem::Ext4, extent: EXTENT };
    if backend.find(Object::Descriptions).await?.is_some() {
        done(backend.place.command(["lvchange", "-ay", "-K", &backend.name(Object::Descriptions)])).await?;
    }
    Ok(ObjectPool::look(root.into(), Arc::new(backend), worker, hold))
}

/// Is what has the thin pool's name one, and one that guests may share?
fn check_pool(place: &LvmPlace, attributes: &str) -> Result<()> {
    let field = "config.lvm.thinpool_name";
    if !attributes.starts_with('t') {
        let text = format!("{:?} is a volume of the group, but no thin pool", place.thin_pool);
        return Err(Error::invalid(field, text));
    }
    // The eighth letter of the attributes, by lvs(8).
    if attributes.as_bytes().get(7) != Some(&b'z') {
        let (group, thin) = (&place.group, &place.thin_pool);
        let text = format!(
            "{thin:?} gives blocks out as they were left, so that a guest could read what another wrote; \
             `lvchange -Zy {group}/{thin}` makes it clear them"
        );
        return Err(Error::invalid(field, text));
    }
    Ok(())
}

/// Pools that have something in a group: their ids, and the thin pool of each.
///
/// # Errors
/// The program is missing, or there is no such group.
pub async fn pools(group: &str) -> Result<Vec<(Uuid, String)>> {
    let args = ["lvs", "--noheadings", "--separator", "|", "-o", "lv_name,lv_attr,pool_lv,lv_tags", group];
    let out = done(lvm(args)).await?;
    let mut found: Vec<_> = out.lines().flat_map(owners).collect();
    found.sort();
    found.dedup();
    Ok(found)
}

/// Whose a volume is, by a line of `lvs`, and its thin pool, which it may be itself.
fn owners(line: &str) -> Vec<(Uuid, String)> {
    let fields: Vec<_> = line.trim().split('|').collect();
    let [name, attributes, pool, tags] = fields[..] else { return vec![] };
    let thin = if attributes.starts_with('t') { name } else { pool };
    let ids = tags.split(',').filter_map(|t| t.strip_prefix(TAG)?.parse().ok());
    ids.filter(|_| !thin.is_empty()).map(|id| (id, thin.to_owned())).collect()
}

/// Tags of what is a pool's begin so.
const TAG: &str = "karst.pool.";

/// Removes what is this pool's in the group: its volumes, and the thin pool when it was made for it.
///
/// # Errors
/// Something of it is in use.
pub async fn clear(place: &LvmPlace) -> Result<()> {
    let found = lvm(["vgs", "--noheadings", "-o", "vg_name", &place.group]).output().await?;
    if found.code != 0 {
        return Ok(());
    }
    let list = ["lvs", "--noheadings", "-o", "lv_name", "-S"];
    let out = done(lvm(list).arg(format!("tags={{{}}}", place.tag())).arg(&place.group)).await?;
    if out.trim().is_empty() {
        return Ok(());
    }
    // Tags name volumes of all groups: those of this pool's id are in one.
    done(place.command(["lvremove", "-f", "-y", &place.selector()])).await.map(drop)
}

/// Name of a group that a pool has for itself.
pub fn own_group(pool: Uuid) -> String {
    format!("karst-{}", &pool.simple().to_string()[..12])
}

fn lvm<'a>(args: impl IntoIterator<Item = &'a str>) -> karst_host::Command {
    run(Program::Lvm).args(args).timeout(PATIENCE).output_cap(64 << 20)
}

fn said(e: &Error, words: &str) -> bool {
    e.context.as_ref().is_some_and(|c| c.contains(words))
}

impl LvmPlace {
    /// All that is this pool's, for LVM's commands.
    pub fn selector(&self) -> String {
        format!("@{}", self.tag())
    }

    fn tag(&self) -> String {
        format!("{TAG}{}", self.id.simple())
    }

    /// A command that changes what is in the group. Of one that is the pool's alone LVM keeps no copies in /etc: they would be
    /// there when the pool is long gone.
    pub fn command<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> karst_host::Command {
        let mut words = args.into_iter();
        let verb = lvm(words.next());
        // Before all else: what a caller adds may belong to the last word that it gave here.
        let verb = match self.group == own_group(self.id) {
            true => verb.args(["--config", "backup{backup=0 archive=0}"]),
            false => verb,
        };
        verb.args(words)
    }
}

impl Lvm {
    /// Two pools in one group may keep the same image: names begin with the pool's.
    fn prefix(&self) -> String {
        format!("k{}_", &self.place.id.simple().to_string()[..8])
    }

    fn short(&self, object: Object) -> String {
        format!("{}{}", self.prefix(), object.text())
    }

    fn name(&self, object: Object) -> String {
        format!("{}/{}", self.place.group, self.short(object))
    }

    fn tags(&self, kept: Kept) -> Vec<String> {
        let mut tags = vec![self.place.tag(), format!("karst.content.{}", kept.content.as_str())];
        tags.extend(kept.on.map(|on| format!("karst.filesystem.{}", on.as_str())));
        tags.into_iter().flat_map(|t| ["--addtag".to_owned(), t]).collect()
    }

    async fn rows(&self) -> Result<Vec<(Object, Kept, f64)>> {
        self.rows_of(&self.place.group).await
    }

    /// Those of the group, or of one volume.
    async fn rows_of(&self, what: &str) -> Result<Vec<(Object, Kept, f64)>> {
        let args = ["lvs", "--noheadings", "--nosuffix", "--units", "b", "--separator", "|"];
        let args = args.into_iter().chain(["-o", "lv_name,lv_size,data_percent,lv_tags", what]);
        let out = done(lvm(args)).await?;
        let (prefix, tag) = (self.prefix(), self.place.tag());
        Ok(out.lines().filter_map(|line| row(&prefix, &tag, line)).collect())
    }
}

/// A line of `lvs`.
fn row(prefix: &str, tag: &str, line: &str) -> Option<(Object, Kept, f64)> {
    let mut fields = line.trim().split('|');
    let object = Object::parse(fields.next()?.strip_prefix(prefix)?)?;
    let size = fields.next()?.parse().ok().map(ByteSize);
    let data = fields.next()?.parse().unwrap_or(0.0);
    let tags: Vec<_> = fields.next()?.split(',').collect();
    if !tags.contains(&tag) {
        return None;
    }
    let content = match tags.iter().find_map(|t| t.strip_prefix("karst.content."))? {
        "filesystem" => VolumeContent::Filesystem,
        "block" => VolumeContent::Block,
        "iso" => VolumeContent::Iso,
        _ => return None,
    };
    let on = tags.iter().find_map(|t| FileSystem::parse(t.strip_prefix("karst.filesystem.")?));
    Some((object, Kept { content, size, on }, data))
}

#[async_trait]
impl Backend for Lvm {
    fn kind(&self) -> PoolKind {
        PoolKind::Lvm
    }

    async fn list(&self) -> Result<Vec<(Object, Kept)>> {
        Ok(self.rows().await?.into_iter().map(|(object, kept, _)| (object, kept)).collect())
    }

    async fn find(&self, object: Object) -> Result<Option<Kept>> {
        match self.rows_of(&self.name(object)).await {
            Ok(rows) => Ok(rows.first().map(|(_, kept, _)| *kept)),
            Err(e) if said(&e, "Failed to find") => Ok(None),
            Err(e) => Err(e),
        }
    }

    async fn rounded(&self, size: ByteSize) -> Result<ByteSize> {
        Ok(ByteSize(size.0.next_multiple_of(self.extent)))
    }

    fn texts(&self) -> Kept {
        Kept { content: VolumeContent::Filesystem, size: Some(TEXTS), on: Some(FileSystem::Ext4) }
    }

    fn tree(&self, size: Option<ByteSize>) -> Kept {
        Kept { content: VolumeContent::Filesystem, size: Some(size.unwrap_or(USUAL)), on: Some(self.on) }
    }

    async fn make(&self, object: Object, kept: Kept) -> Result<()> {
        let size = format!("{}b", kept.size.unwrap_or_default().0);
        let create =
            ["lvcreate", "--type", "thin", "-kn", "-Wn", "-V", &size, "--thinpool", &self.place.thin_pool];
        let create = self.place.command(create).args(["-n", &self.short(object)]).args(self.tags(kept));
        done(create.arg(&self.place.group)).await.map(drop)
    }

    async fn clone(&self, from: Object, to: Object, kept: Kept) -> Result<()> {
        let create = self.place.command(["lvcreate", "-s", "-kn", "-ay", "-n", &self.short(to)]);
        done(create.args(self.tags(kept)).arg(self.name(from))).await.map(drop)
    }

    async fn rename(&self, from: Object, to: Object) -> Result<()> {
        let rename = ["lvrename", &self.place.group, &self.short(from), &self.short(to)];
        done(self.place.command(rename)).await.map(drop)
    }

    async fn remove(&self, object: Object) -> Result<bool> {
        match done(self.place.command(["lvremove", "-f", "-y", &self.name(object)])).await {
            Ok(_) => Ok(true),
            Err(e) if said(&e, "Failed to find") => Ok(true),
            Err(e) if said(&e, "in use") || said(&e, "contains a filesystem") => {
                Err(Error::conflict("the volume is still in use").with_context(e.context.unwrap_or_default()))
            }
            Err(e) => Err(e),
        }
    }

    async fn resize(&self, object: Object, kept: Kept) -> Result<()> {
        let size = format!("{}b", kept.size.unwrap_or_default().0);
        match done(self.place.command(["lvextend", "-L", &size, &self.name(object)])).await {
            // Extents are large: it may have the size already.
            Err(e) if said(&e, "matches existing size") || said(&e, "not larger than existing") => Ok(()),
            other => other.map(drop),
        }
    }

    async fn device(&self, object: Object) -> Result<PathBuf> {
        let path = Path::new("/dev").join(&self.place.group).join(self.short(object));
        until(|_| {
            let path = path.clone();
            async move { Ok(tokio::fs::try_exists(&path).await?.then_some(path)) }
        })
        .await
    }

    async fn mount(&self, _: Object, _: &Path, _: bool) -> Result<()> {
        Err(Error::internal("a logical volume has no data set", ""))
    }

    async fn used(&self, object: Object, _: Kept) -> Result<u64> {
        let found = self.rows_of(&self.name(object)).await?.into_iter().next();
        Ok(found.map_or(0, |(_, kept, percent)| {
            (kept.size.unwrap_or_default().0 as f64 * percent / 100.0) as u64
        }))
    }

    async fn space(&self) -> Result<Usage> {
        let thin = format!("{}/{}", self.place.group, self.place.thin_pool);
        let args = ["lvs", "--noheadings", "--nosuffix", "--units", "b", "--separator", "|"];
        let out = done(lvm(args).args(["-o", "lv_size,data_percent,metadata_percent", &thin])).await?;
        let mut fields = out.trim().split('|').map(|n| n.trim().parse::<f64>().unwrap_or(0.0));
        let (total, data) = (fields.next().unwrap_or(0.0), fields.next().unwrap_or(0.0));
        // Without room for its tables a pool is as full as without room for data.
        let data = data.max(if fields.next().unwrap_or(0.0) > 97.0 { 100.0 } else { 0.0 });
        Ok(Usage { used: (total * data / 100.0) as u64, total: total as u64, ..Usage::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::ImageId;

    #[test]
    fn lines_of_the_list_are_read() {
        let image = Object::Image(ImageId(Uuid::from_u128(9)));
        let line = |tags: &str| format!("  kab_{}|10737418240|12.50|{tags}", image.text());
        let read = |tags: &str| row("kab_", "karst.pool.x", &line(tags));
        let kept = |content, on| Kept { content, size: Some(ByteSize::gib(10)), on };
        assert_eq!(
            read("karst.content.filesystem,karst.filesystem.xfs,karst.pool.x"),
            Some((image, kept(VolumeContent::Filesystem, Some(FileSystem::Xfs)), 12.5))
        );
        assert_eq!(
            read("karst.pool.x,karst.content.block"),
            Some((image, kept(VolumeContent::Block, None), 12.5))
        );
        assert_eq!(read("karst.content.block,karst.pool.y"), None, "another pool's");
        assert_eq!(read(""), None);
        assert_eq!(row("kab_", "karst.pool.x", "  root|10737418240||"), None, "the host's own");
    }

    #[test]
    fn a_thin_pool_that_does_not_clear_its_blocks_is_refused() {
        let place = LvmPlace { group: "vg0".into(), thin_pool: "thin".into(), id: Uuid::from_u128(7) };
        for good in ["twi-aotz--", "twi---tz--"] {
            check_pool(&place, good).unwrap();
        }
        for (bad, word) in
            [("twi-aot---", "lvchange -Zy vg0/thin"), ("-wi-ao----", "no thin pool"), ("", "no")]
        {
            let e = check_pool(&place, bad).unwrap_err();
            assert!(e.message.contains(word), "{e}");
        }
    }

    #[test]
    fn pools_of_a_group_are_found_by_their_tags() {
        let id = Uuid::from_u128(7);
        let tag = format!("karst.pool.{}", id.simple());
        let is = |line: String| owners(&line);
        assert_eq!(is(format!("  thin|twi-aotz--||{tag}")), [(id, "thin".to_owned())]);
        assert_eq!(is(format!("  k0_x|Vwi-a-tz--|t2|karst.content.block,{tag}")), [(id, "t2".to_owned())]);
        for other in ["  root|-wi-ao----||", "  thin|twi-aotz--||theirs", "  x|-wi-ao----||karst.pool.no", ""]
        {
            assert_eq!(is(other.to_owned()), [], "{other}");
        }
    }
}
