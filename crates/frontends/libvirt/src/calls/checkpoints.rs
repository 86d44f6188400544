//! Checkpoints of domains: a line, each with the disks that the host follows since.

use super::{
    Answered, Named, devices::disk_of, domain::is_running, figures::disks, listed, nothing, power::ended,
    text, write_domain,
};
use crate::{
    error::{Code, Part, VirError},
    session::{Call, Driver},
    xdr::{Reader, Writer},
    xml::{self, checkpoint::Shown},
};
use karst_engine::{InstanceView, checkpoints::CreateCheckpoint};
use karst_model::checkpoint::Checkpoint;
use serde_json::json;
use std::{sync::Arc, time::Duration};

/// How long file systems may take to stand still.
const STILL: Duration = Duration::from_secs(30);

fn unsupported(text: impl Into<String>) -> VirError {
    VirError::new(Code::OperationUnsupported, Part::Qemu, text)
}

/// The machine, of a connection that shows machines.
pub(super) fn machine(call: &Call, named: &Named) -> Result<Arc<InstanceView>, VirError> {
    if call.opened()?.driver == Driver::Lxc {
        return Err(VirError::no_support(crate::table::name_of(call.header.program, call.header.procedure)));
    }
    call.guest(named)
}

/// A domain's disks by their names in libvirt's words, and the devices that they are.
pub(super) fn targets(call: &Call, view: &InstanceView) -> Vec<(String, String)> {
    let all = disks(&call.session.front.engine.inner().inventory.read(), view);
    let device = |slot: &str| {
        let found = view.instance.identities.iter().find(|(_, i)| i.slot == slot);
        found.map(|(name, _)| name.clone())
    };
    all.into_iter().filter_map(|d| Some((d.target, device(&d.slot)?))).collect()
}

/// The device of the disk of that name, if the domain has it.
pub(crate) fn device(view: &InstanceView, target: &str) -> Option<String> {
    disk_of(view, target).ok()
}

/// A domain with its checkpoints, the oldest first.
struct Line {
    view: Arc<InstanceView>,
    all: Vec<Checkpoint>,
}

impl Line {
    fn of(call: &Call, named: &Named) -> Result<Self, VirError> {
        let view = machine(call, named)?;
        let session = &call.session;
        let (project, name) = (&view.project.name, &view.instance.name);
        let all = session.front.engine.checkpoints(&session.context, project, name)?;
        Ok(Self { view, all })
    }

    fn demand(&self, name: &str) -> Result<&Checkpoint, VirError> {
        let missing = || {
            let text = format!("no domain checkpoint with matching name '{name}'");
            VirError::new(Code::NoDomainCheckpoint, Part::Qemu, text)
        };
        self.all.iter().find(|c| *c.name == *name).ok_or_else(missing)
    }

    fn children(&self, of: &Checkpoint) -> impl Iterator<Item = &Checkpoint> {
        let id = of.id;
        self.all.iter().filter(move |c| c.parent == Some(id))
    }

    /// Those that descend from one, parents before children.
    fn descendants(&self, of: &Checkpoint) -> Vec<&Checkpoint> {
        let at = self.all.iter().position(|c| c.id == of.id);
        at.map_or(vec![], |at| self.all[at + 1..].iter().collect())
    }

    fn write(&self, w: &mut Writer, checkpoint: &Checkpoint) {
        w.string(&checkpoint.name);
        write_domain(w, &self.view);
    }

    fn answer(&self, checkpoint: &Checkpoint) -> Answered {
        let mut w = Writer::new();
        self.write(&mut w, checkpoint);
        Ok(w.finish().into())
    }

    fn document(
        &self,
        call: &Call,
        checkpoint: &Checkpoint,
        domain: bool,
        sizes: Option<&[(String, u64)]>,
    ) -> Result<String, VirError> {
        let parent = checkpoint.parent.and_then(|p| self.all.iter().find(|c| c.id == p));
        let parent = parent.map(|p| &*p.name);
        let shown = Shown { view: &self.view, checkpoint, parent, sizes, domain };
        xml::checkpoint::document(call, &shown)
    }

    /// Which of some are wanted.
    fn accepts(&self, checkpoint: &Checkpoint, flags: u32) -> bool {
        let leaf = self.children(checkpoint).next().is_none();
        match flags & (LEAVES | NO_LEAVES) {
            LEAVES => leaf,
            NO_LEAVES => !leaf,
            _ => true,
        }
    }
}

/// `remote_nonnull_domain_checkpoint`
fn read(r: &mut Reader<'_>) -> Result<(String, Named), VirError> {
    Ok((r.string()?, Named::read_domain(r)?))
}

/// `VIR_DOMAIN_CHECKPOINT_LIST_*`; the first is roots of a domain's, descendants of a checkpoint's. They are in their order always.
const ROOTS: u32 = 1;
const TOPOLOGICAL: u32 = 1 << 1;
const LEAVES: u32 = 1 << 2;
const NO_LEAVES: u32 = 1 << 3;
const ALL: u32 = ROOTS | TOPOLOGICAL | LEAVES | NO_LEAVES;

/// `DOMAIN_LIST_ALL_CHECKPOINTS`
pub async fn list(call: Call) -> Answered {
    let (named, need_results, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, ALL)?;
    let line = Line::of(&call, &named)?;
    let wanted = |c: &&Checkpoint| (flags & ROOTS == 0 || c.parent.is_none()) && line.accepts(c, flags);
    let found: Vec<_> = line.all.iter().filter(wanted).collect();
    listed(found, need_results, |w, c| line.write(w, c))
}

/// `DOMAIN_CHECKPOINT_LIST_ALL_CHILDREN`
pub async fn children(call: Call) -> Answered {
    let ((name, named), need_results, flags) = call.arguments(|r| Ok((read(r)?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, ALL)?;
    let line = Line::of(&call, &named)?;
    let at = line.demand(&name)?;
    let mut found = if flags & ROOTS != 0 { line.descendants(at) } else { line.children(at).collect() };
    found.retain(|c| line.accepts(c, flags));
    listed(found, need_results, |w, c| line.write(w, c))
}

/// `DOMAIN_CHECKPOINT_LOOKUP_BY_NAME`
pub async fn by_name(call: Call) -> Answered {
    let (named, name, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let line = Line::of(&call, &named)?;
    line.answer(line.demand(&name)?)
}

fn one(call: &Call, known: u32) -> Result<(Line, Checkpoint, u32), VirError> {
    let ((name, named), flags) = call.arguments(|r| Ok((read(r)?, r.u32()?)))?;
    call.known_flags(flags, known)?;
    let line = Line::of(call, &named)?;
    let checkpoint = line.demand(&name)?.clone();
    Ok((line, checkpoint, flags))
}

/// `DOMAIN_CHECKPOINT_GET_PARENT`
pub async fn parent(call: Call) -> Answered {
    let (line, checkpoint, _) = one(&call, 0)?;
    let parent = checkpoint.parent.and_then(|p| line.all.iter().find(|c| c.id == p));
    let missing = || {
        let text = format!("checkpoint '{}' does not have a parent", &*checkpoint.name);
        VirError::new(Code::NoDomainCheckpoint, Part::Qemu, text)
    };
    line.answer(parent.ok_or_else(missing)?)
}

/// `VIR_DOMAIN_CHECKPOINT_XML_*`
const SECURE: u32 = 1;
const NO_DOMAIN: u32 = 2;
const SIZE: u32 = 4;

/// `DOMAIN_CHECKPOINT_GET_XML_DESC`
pub async fn xml(call: Call) -> Answered {
    let (line, checkpoint, flags) = one(&call, SECURE | NO_DOMAIN | SIZE)?;
    if flags & SECURE != 0 && call.session.read_only() {
        let text = "virDomainCheckpointGetXMLDesc with secure flag";
        return Err(VirError::new(Code::OperationDenied, Part::Qemu, text));
    }
    let domain = flags & NO_DOMAIN == 0;
    if flags & SIZE == 0 {
        return Ok(text(&line.document(&call, &checkpoint, domain, None)?));
    }
    let view = &line.view;
    if !is_running(view) {
        return Err(VirError::state("domain is not running"));
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let marks = engine.checkpoint_marks(context, &view.project.name, &view.instance.name).await?;
    // What changed since it is what all have that follow.
    let at = line.all.iter().position(|c| c.id == checkpoint.id).unwrap_or_default();
    let since: Vec<_> = line.all[at..].iter().map(|c| c.id).collect();
    let of = |volume: karst_model::VolumeId| {
        let own = marks.iter().filter(|m| m.volume == volume && since.contains(&m.checkpoint));
        own.map(|m| m.bytes).sum::<u64>()
    };
    let sizes: Vec<_> = checkpoint.disks.iter().map(|d| (d.device.clone(), of(d.volume))).collect();
    Ok(text(&line.document(&call, &checkpoint, domain, Some(&sizes))?))
}

/// `VIR_DOMAIN_CHECKPOINT_CREATE_*`
const REDEFINE: u32 = 1;
const QUIESCE: u32 = 2;
const VALIDATE: u32 = 4;

/// Seconds of the epoch, by which libvirt names what has no name.
pub(super) fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// What is to be made, with the devices of the disks that are named.
pub(super) fn new(view: &InstanceView, text: &str) -> Result<CreateCheckpoint, VirError> {
    let new = xml::checkpoint::read(text)?;
    let disks = new.disks.map(|all| all.iter().map(|d| disk_of(view, d)).collect()).transpose()?;
    let name = new.name.unwrap_or_else(|| now().to_string());
    Ok(CreateCheckpoint { name, note: new.description, disks })
}

/// Makes the file systems inside stand still, or lets them go on.
async fn quiesce(call: &Call, view: &InstanceView, still: bool) -> Result<(), VirError> {
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let command = if still { "guest-fsfreeze-freeze" } else { "guest-fsfreeze-thaw" };
    let (project, name) = (&view.project.name, &view.instance.name);
    engine.guest_agent(context, project, name, (command, json!({})), STILL).await?;
    Ok(())
}

/// `DOMAIN_CHECKPOINT_CREATE_XML`
pub async fn create(call: Call) -> Answered {
    let (named, text, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.u32()?)))?;
    call.known_flags(flags, REDEFINE | QUIESCE | VALIDATE)?;
    if flags & REDEFINE != 0 {
        if flags & QUIESCE != 0 {
            return Err(VirError::argument("what is redefined is made of nothing that could stand still"));
        }
        return redefine(&call, &named, &text).await;
    }
    let view = machine(&call, &named)?;
    if !is_running(&view) {
        return Err(VirError::state("cannot create checkpoint for inactive domain"));
    }
    let new = new(&view, &text)?;
    let name = new.name.clone();
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    if flags & QUIESCE != 0 {
        quiesce(&call, &view, true).await?;
    }
    let made = async {
        let operation =
            engine.checkpoint_create(context, &view.project.name, &view.instance.name, new).await?;
        ended(operation).await
    };
    let made = made.await;
    if flags & QUIESCE != 0 {
        let thawed = quiesce(&call, &view, false).await;
        made?;
        thawed?;
    } else {
        made?;
    }
    let line = Line::of(&call, &named)?;
    line.answer(line.demand(&name)?)
}

/// Gives a checkpoint that is there another description.
async fn redefine(call: &Call, named: &Named, text: &str) -> Answered {
    let (new, name) = xml::checkpoint::named(text)?;
    let line = Line::of(call, named)?;
    let Some(checkpoint) = line.all.iter().find(|c| *c.name == *name) else {
        return Err(unsupported(format!(
            "there is no checkpoint '{name}': a checkpoint is what the host follows, so that none is made, copied or renamed \
             by its document; make it by checkpoint-create"
        )));
    };
    let now = xml::read::document(&line.document(call, checkpoint, true, None)?)?;
    let note = xml::checkpoint::described(&new, &now)?;
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let (project, instance) = (&line.view.project.name, &line.view.instance.name);
    engine.checkpoint_describe(context, project, instance, &name, &note).await?;
    line.answer(checkpoint)
}

/// `VIR_DOMAIN_CHECKPOINT_DELETE_*`
const CHILDREN: u32 = 1;
const METADATA_ONLY: u32 = 2;
const CHILDREN_ONLY: u32 = 4;

/// `DOMAIN_CHECKPOINT_DELETE`: what one has that goes the one before it has then, so the newest goes first.
pub async fn delete(call: Call) -> Answered {
    let (line, checkpoint, flags) = one(&call, CHILDREN | METADATA_ONLY | CHILDREN_ONLY)?;
    if flags & METADATA_ONLY != 0 {
        return Err(unsupported("a checkpoint is nothing without its record"));
    }
    let mut gone: Vec<&Checkpoint> = vec![];
    if flags & (CHILDREN | CHILDREN_ONLY) != 0 {
        gone.extend(line.descendants(&checkpoint).into_iter().rev());
    }
    if flags & CHILDREN_ONLY == 0 {
        gone.push(&checkpoint);
    }
    let session = &call.session;
    let (project, instance) = (&line.view.project.name, &line.view.instance.name);
    for one in gone {
        let engine = &session.front.engine;
        ended(engine.checkpoint_delete(&session.context, project, instance, &one.name).await?).await?;
    }
    Ok(nothing())
}
