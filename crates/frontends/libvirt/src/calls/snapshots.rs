//! Snapshots of domains: a tree, kept by the pools, with the memory of a machine that was prepared for it.

use super::{
    Answered, Named,
    domain::is_running,
    external, flag, int, listed, names as some_names, nothing,
    power::{ended, kill, start, start_paused},
    text, write_domain,
};
use crate::{
    error::{Code, Part, VirError},
    session::Call,
    xdr::{Reader, Writer},
    xml::{
        self,
        machine::{Source, is_no_drive, owned, target},
        snapshot::OfDomain,
    },
};
use karst_engine::{
    InstanceView,
    compute::expand::parse_devices,
    snapshots::{Origin, Taken, change::UpdateSnapshot, create::CreateSnapshot},
};
use karst_model::{
    SnapshotId,
    device::{DiskBus, DiskOrigin},
    snapshot::{Quiesce, Snapshot},
};
use std::{collections::BTreeSet, sync::Arc};

fn unsupported(text: impl Into<String>) -> VirError {
    VirError::new(Code::OperationUnsupported, Part::Qemu, text)
}

/// A domain with its snapshots, oldest first.
struct Tree {
    view: Arc<InstanceView>,
    all: Vec<Snapshot>,
}

impl Tree {
    fn of(call: &Call, named: &Named) -> Result<Self, VirError> {
        let view = call.guest(named)?;
        let session = &call.session;
        let origin = Origin::Instance { project: &view.project.name, name: &view.instance.name };
        let all = session.front.engine.snapshots(&session.context, origin)?;
        let of_instance = |taken: Taken| match taken {
            Taken::Instance { snapshot } => Some(*snapshot),
            Taken::Volume { .. } => None,
        };
        let all = all.into_iter().filter_map(of_instance).collect();
        Ok(Self { view, all })
    }

    fn demand(&self, name: &str) -> Result<&Snapshot, VirError> {
        let missing = || {
            let text = format!("no domain snapshot with matching name '{name}'");
            VirError::new(Code::NoDomainSnapshot, Part::Qemu, text)
        };
        self.all.iter().find(|s| *s.name == *name).ok_or_else(missing)
    }

    fn current(&self) -> Option<&Snapshot> {
        self.all.iter().find(|s| Some(s.id) == self.view.instance.current_snapshot)
    }

    fn children(&self, id: SnapshotId) -> impl Iterator<Item = &Snapshot> {
        self.all.iter().filter(move |s| s.parent == Some(id))
    }

    /// Those that descend from one, parents before children.
    fn descendants(&self, id: SnapshotId) -> Vec<&Snapshot> {
        let mut found: Vec<&Snapshot> = self.children(id).collect();
        let mut seen: BTreeSet<SnapshotId> = found.iter().map(|s| s.id).collect();
        let mut at = 0;
        while at < found.len() {
            let more: Vec<_> = self.children(found[at].id).filter(|s| seen.insert(s.id)).collect();
            found.extend(more);
            at += 1;
        }
        found
    }

    fn write(&self, w: &mut Writer, snapshot: &Snapshot) {
        w.string(&snapshot.name);
        write_domain(w, &self.view);
    }

    fn answer(&self, snapshot: &Snapshot) -> Answered {
        let mut w = Writer::new();
        self.write(&mut w, snapshot);
        Ok(w.finish().into())
    }

    fn document(&self, call: &Call, snapshot: &Snapshot) -> Result<String, VirError> {
        let parent = snapshot.parent.and_then(|p| self.all.iter().find(|s| s.id == p));
        let parent = parent.map(|p| p.name.to_string());
        xml::snapshot::document(call, &self.view, snapshot, parent.as_deref())
    }

    fn origin(&self) -> Origin<'_> {
        Origin::Instance { project: &self.view.project.name, name: &self.view.instance.name }
    }
}

/// `remote_nonnull_domain_snapshot`
fn read(r: &mut Reader<'_>) -> Result<(String, Named), VirError> {
    Ok((r.string()?, Named::read_domain(r)?))
}

/// `VIR_DOMAIN_SNAPSHOT_LIST_*`; the first is roots of a domain's, descendants of a snapshot's.
const ROOTS: u32 = 1;
const METADATA: u32 = 1 << 1;
const LEAVES: u32 = 1 << 2;
const NO_LEAVES: u32 = 1 << 3;
const NO_METADATA: u32 = 1 << 4;
const INACTIVE: u32 = 1 << 5;
const ACTIVE: u32 = 1 << 6;
const DISK_ONLY: u32 = 1 << 7;
const INTERNAL: u32 = 1 << 8;
const EXTERNAL: u32 = 1 << 9;
const ALL: u32 = 0x7ff;

/// Which of them are wanted: within a group any of the flags, and each group that has one.
fn accepts(tree: &Tree, snapshot: &Snapshot, flags: u32) -> bool {
    let leaf = tree.children(snapshot.id).next().is_none();
    let external = snapshot.external.is_some();
    let disk_only = snapshot.external.as_ref().is_some_and(|e| e.running);
    let groups = [
        [(METADATA, true), (NO_METADATA, false), (0, false)],
        [(LEAVES, leaf), (NO_LEAVES, !leaf), (0, false)],
        [(ACTIVE, snapshot.stateful), (INACTIVE, !snapshot.stateful && !disk_only), (DISK_ONLY, disk_only)],
        [(INTERNAL, !external), (EXTERNAL, external), (0, false)],
    ];
    groups.iter().all(|group| {
        let asked = group.iter().any(|(flag, _)| flags & flag != 0);
        !asked || group.iter().any(|(flag, is)| flags & flag != 0 && *is)
    })
}

fn of_domain(tree: &Tree, flags: u32) -> Vec<&Snapshot> {
    let wanted = |s: &&Snapshot| (flags & ROOTS == 0 || s.parent.is_none()) && accepts(tree, s, flags);
    tree.all.iter().filter(wanted).collect()
}

fn of_snapshot<'a>(tree: &'a Tree, name: &str, flags: u32) -> Result<Vec<&'a Snapshot>, VirError> {
    let at = tree.demand(name)?.id;
    let mut found = if flags & ROOTS != 0 { tree.descendants(at) } else { tree.children(at).collect() };
    found.retain(|s| accepts(tree, s, flags));
    Ok(found)
}

/// `DOMAIN_SNAPSHOT_NUM`
pub async fn count(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?)))?;
    call.known_flags(flags, ALL)?;
    Ok(int(of_domain(&Tree::of(&call, &named)?, flags).len() as i32))
}

/// `DOMAIN_SNAPSHOT_LIST_NAMES`
pub async fn names(call: Call) -> Answered {
    let (named, max, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, ALL)?;
    let tree = Tree::of(&call, &named)?;
    some_names(of_domain(&tree, flags).iter().map(|s| &*s.name), max)
}

/// `DOMAIN_LIST_ALL_SNAPSHOTS`
pub async fn list(call: Call) -> Answered {
    let (named, need_results, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, ALL)?;
    let tree = Tree::of(&call, &named)?;
    listed(of_domain(&tree, flags), need_results, |w, s| tree.write(w, s))
}

/// `DOMAIN_SNAPSHOT_NUM_CHILDREN`
pub async fn count_children(call: Call) -> Answered {
    let ((name, named), flags) = call.arguments(|r| Ok((read(r)?, r.u32()?)))?;
    call.known_flags(flags, ALL)?;
    Ok(int(of_snapshot(&Tree::of(&call, &named)?, &name, flags)?.len() as i32))
}

/// `DOMAIN_SNAPSHOT_LIST_CHILDREN_NAMES`
pub async fn children_names(call: Call) -> Answered {
    let ((name, named), max, flags) = call.arguments(|r| Ok((read(r)?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, ALL)?;
    let tree = Tree::of(&call, &named)?;
    some_names(of_snapshot(&tree, &name, flags)?.iter().map(|s| &*s.name), max)
}

/// `DOMAIN_SNAPSHOT_LIST_ALL_CHILDREN`
pub async fn children(call: Call) -> Answered {
    let ((name, named), need_results, flags) = call.arguments(|r| Ok((read(r)?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, ALL)?;
    let tree = Tree::of(&call, &named)?;
    listed(of_snapshot(&tree, &name, flags)?, need_results, |w, s| tree.write(w, s))
}

/// `DOMAIN_SNAPSHOT_LOOKUP_BY_NAME`
pub async fn by_name(call: Call) -> Answered {
    let (named, name, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let tree = Tree::of(&call, &named)?;
    tree.answer(tree.demand(&name)?)
}

/// `DOMAIN_HAS_CURRENT_SNAPSHOT`
pub async fn has_current(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    Ok(flag(Tree::of(&call, &named)?.current().is_some()))
}

/// `DOMAIN_SNAPSHOT_CURRENT`
pub async fn current(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let tree = Tree::of(&call, &named)?;
    let missing =
        || VirError::new(Code::NoDomainSnapshot, Part::Qemu, "the domain does not have a current snapshot");
    tree.answer(tree.current().ok_or_else(missing)?)
}

fn one(call: &Call, known: u32) -> Result<(Tree, Snapshot, u32), VirError> {
    let ((name, named), flags) = call.arguments(|r| Ok((read(r)?, r.u32()?)))?;
    call.known_flags(flags, known)?;
    let tree = Tree::of(call, &named)?;
    let snapshot = tree.demand(&name)?.clone();
    Ok((tree, snapshot, flags))
}

/// `DOMAIN_SNAPSHOT_GET_PARENT`
pub async fn parent(call: Call) -> Answered {
    let (tree, snapshot, _) = one(&call, 0)?;
    let parent = snapshot.parent.and_then(|p| tree.all.iter().find(|s| s.id == p));
    let missing = || {
        let text = format!("snapshot '{}' does not have a parent", &*snapshot.name);
        VirError::new(Code::NoDomainSnapshot, Part::Qemu, text)
    };
    tree.answer(parent.ok_or_else(missing)?)
}

/// `DOMAIN_SNAPSHOT_IS_CURRENT`
pub async fn is_current(call: Call) -> Answered {
    let (tree, snapshot, _) = one(&call, 0)?;
    Ok(flag(tree.current().is_some_and(|c| c.id == snapshot.id)))
}

/// `DOMAIN_SNAPSHOT_HAS_METADATA`: all have, and are nothing without.
pub async fn has_metadata(call: Call) -> Answered {
    one(&call, 0)?;
    Ok(flag(true))
}

/// `DOMAIN_SNAPSHOT_GET_XML_DESC`
pub async fn xml(call: Call) -> Answered {
    // Secure.
    let (tree, snapshot, flags) = one(&call, 1)?;
    if flags & 1 != 0 && call.session.read_only() {
        let text = "virDomainSnapshotGetXMLDesc with secure flag";
        return Err(VirError::new(Code::OperationDenied, Part::Qemu, text));
    }
    Ok(text(&tree.document(&call, &snapshot)?))
}

/// `VIR_DOMAIN_SNAPSHOT_CREATE_*`
const REDEFINE: u32 = 1;
const CURRENT: u32 = 2;
const NO_META: u32 = 4;
const HALT: u32 = 8;
const DISK: u32 = 16;
const REUSE: u32 = 32;
pub(super) const QUIESCE: u32 = 64;
const ATOMIC: u32 = 128;
const ONLINE: u32 = 256;
const VALIDATE: u32 = 512;

/// `DOMAIN_SNAPSHOT_CREATE_XML`
pub async fn create(call: Call) -> Answered {
    let (named, text, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.u32()?)))?;
    if flags & REDEFINE != 0 {
        return redefine(&call, &named, &text, flags).await;
    }
    let refused = [
        (CURRENT, "snapshots are what the pool keeps; their records are not written apart"),
        (REUSE, "what a disk goes on in is made by its pool, empty, and is no file that is there"),
        (ONLINE, "the guest is paused for the moment that a snapshot takes"),
    ];
    if let Some((_, why)) = refused.iter().find(|(flag, _)| flags & flag != 0) {
        return Err(unsupported(*why));
    }
    call.known_flags(flags, NO_META | DISK | HALT | QUIESCE | ATOMIC | VALIDATE)?;
    let view = call.guest(&named)?;
    let new = xml::snapshot::read(&text, flags & DISK != 0)?;
    if new.external.is_some() {
        let name = new.name.clone().unwrap_or_else(|| now().to_string());
        external::create(&call, &view, new, (&name, flags)).await?;
        if flags & HALT != 0 && is_running(&view) {
            kill(&call, &view).await?;
        }
        // Also one without a record is answered by its name.
        let mut w = Writer::new();
        w.string(&name);
        write_domain(&mut w, &view);
        return Ok(w.finish().into());
    }
    if flags & NO_META != 0 {
        return Err(unsupported(
            "an internal snapshot is what the pool keeps: it is nothing without its record",
        ));
    }
    let still = flags & QUIESCE != 0;
    if still && new.memory == Some(true) {
        return Err(VirError::argument(
            "a snapshot with memory is of a guest as it runs; quiesce one without",
        ));
    }
    if still && !is_running(&view) {
        return Err(VirError::state("domain is not running"));
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let origin = Origin::Instance { project: &view.project.name, name: &view.instance.name };
    let running = is_running(&view) && view.instance.hardware.is_some();
    if view.instance.hardware.is_some() {
        xml::snapshot::check_disks(&new.disks, &disks(&call, &view)?)?;
    }
    let name = new.name.unwrap_or_else(|| now().to_string());
    let request = CreateSnapshot {
        name: Some(name.clone()),
        note: new.description,
        stateful: running && new.memory.unwrap_or(!still),
        quiesce: still.then_some(Quiesce::Require),
        ..CreateSnapshot::default()
    };
    ended(engine.snapshot_create(context, origin, request).await?).await?;
    if flags & HALT != 0 && is_running(&view) {
        kill(&call, &view).await?;
    }
    let tree = Tree::of(&call, &named)?;
    tree.answer(tree.demand(&name)?)
}

/// The disks of a machine, also those that only its guest still has, as snapshots of it treat them.
pub(super) fn disks(call: &Call, view: &InstanceView) -> Result<Vec<OfDomain>, VirError> {
    let session = &call.session;
    let engine = &session.front.engine;
    let gaps = engine.snapshot_gaps(&session.context, &view.project.name, &view.instance.name)?;
    let (mut disks, mut seen): (Vec<OfDomain>, BTreeSet<String>) = Default::default();
    let mut add = |name: &str, source: Option<Source>, bus: Option<DiskBus>, held: bool| {
        let Some(identity) =
            view.instance.identities.get(name).filter(|i| !is_no_drive(i) && seen.insert(name.to_owned()))
        else {
            return;
        };
        let gap = gaps.iter().any(|g| g == name);
        disks.push(OfDomain {
            target: target(&identity.slot, bus.unwrap_or(DiskBus::VirtioScsi)).0,
            path: source.map(|s| s.path()),
            held: held && !gap,
            written: held || gap,
        });
    };
    let applied = view.runtime.as_ref().and_then(|r| r.applied.as_ref()).filter(|_| is_running(view));
    for devices in [Some(&view.expanded_devices), applied.map(|a| &a.devices)].into_iter().flatten() {
        let parsed = parse_devices(devices)?;
        let (name, root) = parsed.root;
        let volume = root.source.unwrap_or_else(|| owned(&view.instance.name));
        add(&name, Some(Source::Volume { pool: root.pool, volume }), root.io.bus, true);
        for (name, disk) in parsed.disks.into_iter().filter(|(_, d)| d.path.is_none()) {
            let source = match disk.source {
                DiskOrigin::Volume { pool, volume } => Some(Source::Volume { pool, volume }),
                DiskOrigin::Host { path } => Some(Source::Path(path)),
                DiskOrigin::Memory { .. } => None,
            };
            add(&name, source.filter(|_| disk.attached), disk.io.bus, false);
        }
    }
    Ok(disks)
}

/// Gives a snapshot that is there another description.
async fn redefine(call: &Call, named: &Named, text: &str, flags: u32) -> Answered {
    call.known_flags(flags, REDEFINE | CURRENT | VALIDATE)?;
    let (new, name) = xml::snapshot::named(text)?;
    let tree = Tree::of(call, named)?;
    let Some(snapshot) = tree.all.iter().find(|s| *s.name == *name) else {
        return Err(unsupported(format!(
            "there is no snapshot '{name}': a snapshot is what the pool keeps, so that none is made, copied or renamed \
             by its document; take it by snapshot-create"
        )));
    };
    if flags & CURRENT != 0 && tree.current().is_none_or(|c| c.id != snapshot.id) {
        return Err(unsupported(format!(
            "snapshot '{name}' is not the one that the domain's disks descend from; it becomes current by \
             snapshot-revert"
        )));
    }
    let now = xml::read::document(&tree.document(call, snapshot)?)?;
    let update = UpdateSnapshot {
        expires_at: snapshot.expires_at,
        note: Some(xml::snapshot::described(&new, &now)?),
        // What the new document was compared with.
        if_version: Some(snapshot.spec_version),
        ..UpdateSnapshot::default()
    };
    let session = &call.session;
    session.front.engine.snapshot_update(&session.context, tree.origin(), &name, update).await?;
    tree.answer(snapshot)
}

/// Seconds of the epoch, by which libvirt names what has no name.
fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// `VIR_DOMAIN_SNAPSHOT_REVERT_*`
const RUNNING: u32 = 1;
const PAUSED: u32 = 2;

/// `DOMAIN_REVERT_TO_SNAPSHOT`: afterwards the domain is as it was then, running if its memory was kept.
pub async fn revert(call: Call) -> Answered {
    // By force; with fresh variables of the firmware it is not.
    let (tree, snapshot, flags) = one(&call, RUNNING | PAUSED | 4)?;
    if flags & RUNNING != 0 && flags & PAUSED != 0 {
        return Err(VirError::argument("running and paused are exclusive"));
    }
    if snapshot.external.is_some() {
        let text = "revert to external snapshot not supported yet";
        return Err(VirError::new(Code::ConfigUnsupported, Part::Qemu, text));
    }
    let view = &tree.view;
    if is_running(view) && !snapshot.stateful {
        kill(&call, view).await?;
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let (memory, paused) = (snapshot.stateful, flags & PAUSED != 0);
    let (origin, name) = (tree.origin(), &snapshot.name);
    let operation = match memory && paused {
        true => engine.snapshot_restore_paused(context, origin, name).await?,
        false => engine.snapshot_restore_with(context, origin, name, memory).await?,
    };
    ended(operation).await?;
    let view = call.session.guest(&view.instance.name)?;
    match is_running(&view) {
        false if paused => start_paused(&call, &view).await?,
        false if flags & RUNNING != 0 => start(&call, &view).await?,
        _ => {}
    }
    Ok(nothing())
}

/// `VIR_DOMAIN_SNAPSHOT_DELETE_*`
const CHILDREN: u32 = 1;
const METADATA_ONLY: u32 = 2;
const CHILDREN_ONLY: u32 = 4;

/// Which snapshots are gone when others could not be deleted.
fn in_the_middle(e: VirError, gone: &[&Snapshot], left: &[&Snapshot]) -> VirError {
    let names =
        |all: &[&Snapshot]| all.iter().map(|s| format!("'{}'", &*s.name)).collect::<Vec<_>>().join(", ");
    match gone.is_empty() {
        true => e,
        false => {
            VirError { text: format!("{}; deleted are {}, not {}", e.text, names(gone), names(left)), ..e }
        }
    }
}

/// `DOMAIN_SNAPSHOT_DELETE`: children of one that goes descend from its parent, unless they go too.
pub async fn delete(call: Call) -> Answered {
    let (tree, snapshot, flags) = one(&call, CHILDREN | METADATA_ONLY | CHILDREN_ONLY)?;
    let metadata = flags & METADATA_ONLY != 0;
    let config = |text: &str| VirError::new(Code::ConfigUnsupported, Part::Qemu, text);
    let children = tree.descendants(snapshot.id);
    let below = flags & (CHILDREN | CHILDREN_ONLY) != 0;
    let external = |s: &Snapshot| s.external.is_some();
    if !metadata && below && children.iter().any(|s| external(s)) {
        return Err(config(match children.iter().all(|s| external(s)) {
            true => "deletion of external children disk snapshots not supported",
            false => "deletion of external and internal children disk snapshots not supported",
        }));
    }
    if !metadata && flags & CHILDREN_ONLY == 0 && external(&snapshot) && !children.is_empty() {
        return Err(config("deletion of external disk snapshots with children not supported"));
    }
    let mut gone: Vec<&Snapshot> = vec![];
    if flags & (CHILDREN | CHILDREN_ONLY) != 0 {
        gone.extend(tree.descendants(snapshot.id).into_iter().rev());
    }
    if flags & CHILDREN_ONLY == 0 {
        gone.push(&snapshot);
    }
    if metadata && gone.iter().any(|s| !external(s)) {
        return Err(unsupported("an internal snapshot is nothing without its record"));
    }
    let session = &call.session;
    let engine = &session.front.engine;
    for (n, one) in gone.iter().enumerate() {
        if !metadata && external(one) {
            super::external::commit(&call, &tree.view, one).await?;
        }
        let deleted = match engine.snapshot_delete(&session.context, tree.origin(), &one.name).await {
            Ok(operation) => ended(operation).await,
            Err(e) => Err(e.into()),
        };
        // What is gone cannot be brought back. From the last descendants on, so that what is left is a tree.
        deleted.map_err(|e| in_the_middle(e, &gone[..n], &gone[n..]))?;
    }
    Ok(nothing())
}
