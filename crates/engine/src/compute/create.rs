//! Creating instances.

use super::{
    disks::{check_disks, demand_drives},
    expand, lock, path, slots, templates,
};
use crate::{
    Engine, EngineInner, Records, Row,
    context::Context,
    db::Tx,
    events::RESUMED,
    images::FEATURE,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    tenancy::limits::{Planned, admit},
};
use async_trait::async_trait;
use karst_agent::VolumeRef;
use karst_model::{
    ByteSize, Config, Error, ImageId, InstanceId, Name, NetworkId, Result, VolumeId,
    access::Permission,
    application,
    device::{Device, Devices, RootDevice},
    guest::Observed,
    image::Image,
    instance::{DesiredPower, Generation, Hardware, Instance, InstanceKind, Lifecycle, Since},
    keys, keys_machine,
    spec::{GuestSpec, NicSpec, VolumeSource, VolumeSpec},
    storage::{Volume, VolumeContent, VolumeOwner},
    template::Trigger,
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, time::Duration};

/// What a user wants created.
#[derive(Debug, Clone)]
pub struct CreateInstance {
    /// Name; one is made up when absent.
    pub name: Option<String>,
    /// Kind.
    pub kind: InstanceKind,
    /// User's text.
    pub description: String,
    /// Removed when it stops.
    pub ephemeral: bool,
    /// Configuration as written.
    pub config: Config,
    /// Devices as written.
    pub devices: Devices,
    /// Profile names; `None` is `default`.
    pub profiles: Option<Vec<String>>,
    /// What its root begins as.
    pub source: InstanceSource,
    /// Start it when it is there.
    pub start: bool,
    /// Name of the node it is to be on; `None`: the engine's own.
    pub target: Option<String>,
    /// Its VMID; the next is drawn when absent.
    pub vmid: Option<karst_model::Vmid>,
}

/// What the root of a new instance begins as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InstanceSource {
    /// Empty.
    None,
    /// Empty, and what fills it makes it an application container.
    Application,
    /// An image by fingerprint, unique beginning of it, or alias.
    Image(String),
    /// The same of another project.
    ImageOf {
        /// Its name; it may have the images of the project that it shares them with.
        project: String,
        /// Which.
        reference: String,
    },
}

/// Smallest root disk of a virtual machine without a size.
pub(crate) const DEFAULT_VM_DISK: ByteSize = ByteSize::gib(10);

impl Engine {
    /// Creates an instance; answers its name and the operation.
    ///
    /// # Errors
    /// Invalid by field, not found (profile, image, pool, network), conflict (taken name), forbidden.
    pub async fn instance_create(
        &self,
        context: &Context,
        project: &str,
        request: CreateInstance,
    ) -> Result<(String, LiveOperation)> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        super::vmids::demand_choice(context, request.vmid)?;
        self.demand_source(context, &request.source)?;
        demand_drives(context, &Devices::new(), &request.devices)?;
        let inner = self.inner();
        let mut made_up = None;
        let mut chosen = String::new();
        let operation = runner::start::<InstanceCreate>(inner, context, |tx| {
            let records = inner.inventory.read();
            let name = match &request.name {
                Some(n) if !n.is_empty() => Name::parse("name", n)?,
                _ => made_up.get_or_insert_with(|| make_up_name(inner, &records, project.id)).clone(),
            };
            chosen = name.to_string();
            tx.expect(&project);
            records.demand_seen_acls(context, &project, &request.devices)?;
            let plan = plan(inner, &records, tx, &project, name.clone(), &request)?;
            let mut new = NewOperation::task(
                "Creating instance",
                Some(project.id),
                "instances",
                path(&project.name, &name),
            );
            new.may_cancel = true;
            Ok((plan, new))
        })
        .await?;
        Ok((chosen, operation))
    }

    /// Demands that an instance on the node `target` (`None`: the engine's own) may be of `architecture`, by one of its names.
    ///
    /// # Errors
    /// Invalid by field.
    pub fn demand_architecture(
        &self,
        context: &Context,
        target: Option<&str>,
        architecture: &str,
    ) -> Result<()> {
        context.demand_known()?;
        let name = match architecture {
            "amd64" => "x86_64",
            "arm64" => "aarch64",
            other => other,
        };
        let inner = self.inner();
        let records = inner.inventory.read();
        let node = match target {
            None => records.nodes.get(&inner.node),
            Some(target) => records.nodes.values().find(|n| *n.name == *target),
        };
        // A node that is not there is told by what makes the instance.
        let Some(node) = node else { return Ok(()) };
        let said = node.facts.as_ref().map(|f| f.architecture.as_str()).filter(|a| !a.is_empty());
        let here = said.unwrap_or(std::env::consts::ARCH);
        if name == here {
            return Ok(());
        }
        let text = format!("{architecture:?} does not run on this host; leave it out, or say {here:?}");
        Err(Error::invalid("architecture", text))
    }

    /// Demands that `context` may see the project whose image the source names.
    pub(crate) fn demand_source(&self, context: &Context, source: &InstanceSource) -> Result<()> {
        if let InstanceSource::ImageOf { project, .. } = source {
            self.project(context, project, Permission::ProjectView).map_err(|e| e.at("source.project"))?;
        }
        Ok(())
    }
}

impl EngineInner {
    /// The image that an instance of that kind in `project` begins as; [`Engine::demand_source`] was asked before.
    pub(crate) fn source_image(
        &self,
        records: &Records,
        project: &karst_model::project::Project,
        source: &InstanceSource,
        kind: InstanceKind,
    ) -> Result<Option<Row<Image>>> {
        let (home, reference) = match source {
            InstanceSource::None | InstanceSource::Application => return Ok(None),
            InstanceSource::Image(reference) => (records.home(project, FEATURE), reference),
            InstanceSource::ImageOf { project, reference } => {
                let named = records.project(project).map_err(|e| e.at("source.project"))?;
                (records.home(named, FEATURE), reference)
            }
        };
        let image = self.resolve_image(records, home, reference, Some(kind))?;
        if image.kind != kind {
            let text = format!("image {reference:?} is for a {}, not for a {kind}", image.kind);
            return Err(Error::invalid("source.alias", text));
        }
        Ok(Some(image))
    }
}

pub(crate) fn make_up_name(inner: &EngineInner, records: &Records, project: karst_model::ProjectId) -> Name {
    const FIRST: [&str; 16] = [
        "amber", "bold", "calm", "clever", "deep", "eager", "fair", "gentle", "keen", "lively", "mellow",
        "noble", "quick", "quiet", "steady", "warm",
    ];
    const SECOND: [&str; 16] = [
        "badger", "bat", "beetle", "cave", "crane", "doline", "falcon", "gorge", "heron", "lynx", "marten",
        "olm", "otter", "polje", "spring", "swift",
    ];
    for _ in 0..64 {
        let r = inner.env.random_u64();
        let base = format!("{}-{}", FIRST[(r & 15) as usize], SECOND[(r >> 4 & 15) as usize]);
        let name = if r >> 8 & 3 == 0 { base } else { format!("{base}-{}", r >> 16 & 0xfff) };
        if !records.instance_names.contains_key(&(project, name.clone()))
            && let Ok(name) = Name::parse("name", &name)
        {
            return name;
        }
    }
    // 64 collisions: the space is full of names; a UUID cannot collide.
    let id = inner.env.uuid().simple().to_string();
    Name::parse("name", &format!("i-{id}")).expect("hex digits are a name")
}

pub(crate) fn plan(
    inner: &EngineInner,
    records: &Records,
    tx: &mut Tx,
    project: &karst_model::project::Project,
    name: Name,
    request: &CreateInstance,
) -> Result<CreatePlan> {
    inner.demand_free_name(records, project.id, &name)?;
    let profile_names = request.profiles.clone().unwrap_or_else(|| vec!["default".into()]);
    let mut profiles = vec![];
    let home = records.home(project, "features.profiles");
    for (n, profile) in profile_names.iter().enumerate() {
        let row = records.profile(home, profile).map_err(|e| e.at(format!("profiles[{n}]")))?;
        if profiles.contains(&row.id) {
            return Err(Error::invalid(
                format!("profiles[{n}]"),
                format!("profile {profile:?} is named twice"),
            ));
        }
        tx.expect(row);
        crate::tenancy::profiles::demand_idle(records, tx, row.id)?;
        tx.touch(&crate::tenancy::profile_uses(row.id));
        profiles.push(row.id);
    }
    if let Some(key) = request.config.keys().find(|k| k.starts_with("volatile.")) {
        return Err(Error::invalid(
            format!("config.{key}"),
            "volatile keys are kept by the platform and cannot be set",
        ));
    }
    keys::check(&request.config, Some(request.kind))?;
    check_devices(&request.devices)?;
    let image = inner.source_image(records, project, &request.source, request.kind)?;
    if let Some(row) = &image {
        tx.expect_unlocked(&crate::images::lock(row.id));
        tx.expect(row);
        crate::images::used(tx, row, inner.env.now());
    }
    let now = inner.env.now();
    let id = InstanceId(inner.env.uuid());
    let volume_id = VolumeId(inner.env.uuid());
    let node = match &request.target {
        None => records.nodes.get(&inner.node),
        Some(name) => records.nodes.values().find(|n| *n.name == **name),
    };
    let node = node.ok_or_else(|| {
        Error::not_found(format!("node {:?} not found", request.target.as_deref().unwrap_or_default()))
            .at("target")
    })?;
    let mut instance = Instance {
        id,
        project: project.id,
        name: name.clone(),
        // Given below, when nothing can be wrong any more: a refused request leaves no gap.
        vmid: karst_model::Vmid(0),
        vmid_chosen: request.vmid.is_some(),
        kind: request.kind,
        architecture: "x86_64".into(),
        description: request.description.clone(),
        ephemeral: request.ephemeral,
        config: request.config.clone(),
        devices: request.devices.clone(),
        profiles,
        image: image.as_ref().map(|i| i.id),
        image_properties: image
            .iter()
            .flat_map(|i| i.properties.iter().map(|(k, v)| (format!("image.{k}"), v.clone())))
            .collect(),
        volatile: Config::new(),
        metadata: None,
        identities: BTreeMap::new(),
        hardware: None,
        pool: karst_model::PoolId(uuid::Uuid::nil()),
        root: volume_id,
        node: node.id,
        generation: Generation { incarnation: records.incarnation, n: 0 },
        power: DesiredPower::Stopped,
        current_snapshot: None,
        stateful: false,
        spec_version: 1,
        lifecycle: Lifecycle::Creating,
        created_at: now,
        last_used_at: None,
    };
    if request.source == InstanceSource::Application {
        instance.volatile.insert(application::MARK.into(), "true".into());
    }
    if let Some(application) = image.as_ref().and_then(|i| i.application.as_ref()) {
        // Where neither the request nor a profile says otherwise.
        let (said, _) = records.expanded(&instance);
        let mut filled = said.clone();
        application::fill_in(&mut filled, application);
        instance.config.extend(filled.into_iter().filter(|(k, _)| !said.contains_key(k)));
        instance.volatile.insert(application::MARK.into(), "true".into());
    }
    let (config, devices) = records.expanded(&instance);
    keys::check(&config, Some(request.kind)).map_err(|e| e.with_context("expanded"))?;
    keys::limits(&config)?;
    crate::screens::demand(records, &instance, &Config::new(), &config)?;
    let parsed = expand::parse_devices(&devices)?;
    check_disks(records, tx, &instance, &parsed)?;
    let (root_name, RootDevice { pool, size, full_copy, .. }) = &parsed.root;
    let pool = records.pool(pool).map_err(|e| e.at(format!("devices.{root_name}.pool")))?;
    crate::storage::use_pool(tx, pool)?;
    instance.pool = pool.id;
    let attached = super::disks::custom_root(records, &instance, &parsed)?.cloned();
    if let Some(volume) = &attached {
        if image.is_some() {
            return Err(Error::invalid(
                "source",
                "a root disk that is a custom volume has its content already; leave the image out",
            ));
        }
        instance.root = volume.id;
    }
    if request.kind == InstanceKind::VirtualMachine {
        let facts = node.facts.as_ref().ok_or_else(|| {
            Error::unavailable("the host has not reported what it is yet; try again in a moment")
        })?;
        let machine = facts.default_machine.clone().ok_or_else(|| {
            Error::unsupported(
                "virtual machines need QEMU, of which the host does not know; install the package qemu-system-x86, \
                 or look at the host's warnings",
            )
        })?;
        let kvm = facts.accelerator.kind == karst_model::node::AcceleratorKind::Kvm;
        let choice = keys_machine::hardware(&config)?;
        let machine = slots::versioned(choice.machine.as_deref(), &machine);
        instance.hardware = Some(Hardware {
            ports: slots::ports(&machine),
            display: true,
            balloon: true,
            machine,
            cpu_model: choice.cpu_model.unwrap_or_else(|| if kvm { "host".into() } else { "max".into() }),
            firmware: choice.firmware,
            uuid: id.uuid(),
            cloud_init_id: inner.env.uuid(),
        });
    }
    instance.identities = inner.assign_identities(
        records,
        &BTreeMap::new(),
        &parsed,
        instance.hardware.as_ref(),
        instance.root,
    );
    inner.check_nics(records, tx, &instance, &parsed)?;
    inner.demand_own_label(records, &instance, "name")?;
    if let Some(image) = &image {
        instance.volatile.insert("volatile.base_image".into(), image.fingerprint.clone());
        templates::take(&mut instance, records, &image.templates, Trigger::Create);
    }
    instance.volatile.insert("volatile.uuid".into(), id.to_string());
    let content = match request.kind {
        InstanceKind::Container => VolumeContent::Filesystem,
        InstanceKind::VirtualMachine => VolumeContent::Block,
    };
    let size = match (size, pool.root_size(content), request.kind) {
        (Some(s), ..) => Some(*s),
        (None, Some(s), _) => Some(s),
        (None, None, InstanceKind::VirtualMachine) => Some(DEFAULT_VM_DISK),
        (None, None, InstanceKind::Container) => None,
    };
    let own = Volume {
        id: volume_id,
        pool: pool.id,
        project: project.id,
        name: name.to_string(),
        content,
        owner: VolumeOwner::Instance { instance: id },
        description: String::new(),
        size,
        config: full_copy.iter().map(|full| ("full_copy".to_owned(), full.to_string())).collect(),
        spec_version: 1,
        created_at: now,
        layers: Default::default(),
    };
    let volume = attached.as_ref().map_or(own, |row| row.value.clone());
    admit(records, tx, project.id, &Planned { instance: Some(&instance), ..Default::default() })?;
    // Whatever is wrong with it is said now, not at the first start.
    inner.guest_spec(records, &instance, 0)?;
    instance.vmid = match request.vmid {
        Some(chosen) => inner.choose_vmid(records, tx, chosen)?,
        None => inner.take_vmid(records, tx),
    };
    let mut start = None;
    if request.start {
        inner.demand_staying()?;
        super::power::demand_startable(&instance, &records.expanded(&instance).0)?;
        crate::network::life::demand_active(records, instance.project, &parsed)?;
        instance.generation = instance.generation.next_in(records.incarnation);
        instance.power = DesiredPower::Running;
        instance.last_used_at = Some(now);
        let spec = inner.start_spec(records, &instance, inner.take_domain_id())?;
        start = Some(StartPlan { networks: networks_of(&spec), spec });
    }
    Ok(CreatePlan {
        path: path(&project.name, &name),
        source: match &image {
            Some(i) => VolumeSource::Image { image: i.id, full: pool.full_copy(&volume.config) },
            None => VolumeSource::Empty,
        },
        image: image.map(|i| i.id),
        instance,
        volume,
        attached: attached.is_some(),
        start,
    })
}

/// Devices as written, also those that vanish when they are expanded (`type=none` masks one of a profile).
pub(crate) fn check_devices(devices: &Devices) -> Result<()> {
    for (name, keys) in devices {
        Device::parse(name, keys)?;
    }
    Ok(())
}

/// The networks that a start needs.
pub(crate) fn networks_of(spec: &GuestSpec) -> Vec<NetworkId> {
    let mut ids: Vec<_> = spec.nics.iter().filter_map(NicSpec::network).collect();
    ids.sort();
    ids.dedup();
    ids
}

/// How a created instance is to be started.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StartPlan {
    /// What the host gets.
    pub spec: GuestSpec,
    /// Networks to bring up to date first.
    pub networks: Vec<NetworkId>,
}

impl StartPlan {
    /// A virtual machine stands still then, before its first instruction.
    pub(crate) fn pause(&mut self) {
        if let Some(machine) = &mut self.spec.machine {
            machine.paused = true;
        }
    }

    /// A virtual machine has forgotten then what its firmware kept.
    pub(crate) fn forget_firmware(&mut self) {
        if let Some(machine) = &mut self.spec.machine {
            machine.fresh_firmware = true;
        }
    }

    /// A virtual machine goes on from memory in a file of its host.
    pub(crate) fn go_on_from(&mut self, file: &str) {
        self.spec.memory = Some(file.to_owned());
        if let Some(machine) = &mut self.spec.machine {
            machine.resume = true;
        }
    }

    /// Does it?
    fn is_paused(&self) -> bool {
        self.spec.machine.as_ref().is_some_and(|m| m.paused)
    }
}

/// Plan of [`InstanceCreate`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CreatePlan {
    pub(crate) instance: Instance,
    pub(crate) volume: Volume,
    /// The root volume is a custom one, which was there before and stays when the instance goes.
    #[serde(default)]
    attached: bool,
    source: VolumeSource,
    image: Option<ImageId>,
    pub(crate) start: Option<StartPlan>,
    path: String,
}

impl CreatePlan {
    /// The records of an instance that is being made, with its names.
    pub(crate) fn begin(&self, tx: &mut Tx) {
        let i = &self.instance;
        tx.create(i);
        tx.take_name("instances", &i.project.to_string(), &i.name, &i.id.to_string());
        tx.take_name("vmids", "", &i.vmid.to_string(), &i.id.to_string());
        if !self.attached {
            tx.create(&self.volume);
        }
    }

    /// Of an instance whose root is filled: it must be the instance's own.
    ///
    /// # Errors
    /// Conflict when a profile says that it is a custom volume.
    pub(crate) fn demand_own_root(&self) -> Result<()> {
        match self.attached {
            false => Ok(()),
            true => Err(Error::conflict(
                "the root disk of a profile is a custom volume, which would be overwritten; give the instance a root disk of its own",
            )
            .at("devices")),
        }
    }

    /// It goes on from memory in a file of its host.
    fn is_of_file(&self) -> bool {
        self.start.as_ref().is_some_and(|s| s.spec.memory.is_some())
    }

    /// What is told of it when it is there.
    pub(crate) fn announce(&self) -> Vec<(&'static str, String)> {
        let mut events = vec![("instance-created", self.path.clone())];
        if let Some(start) = &self.start {
            events.push(("instance-started", self.path.clone()));
            if start.is_paused() {
                events.push(("instance-paused", self.path.clone()));
            }
        }
        events
    }
}

/// Outputs of [`InstanceCreate`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CreateOutputs {
    observed: Option<Observed>,
}

/// Makes the volume, then the instance is there; starts it when asked to.
pub struct InstanceCreate;

#[async_trait]
impl Saga for InstanceCreate {
    const NAME: &'static str = "instance-create";
    const STEPS: &'static [&'static str] = &["volume", "start"];
    type Plan = CreatePlan;
    type Outputs = CreateOutputs;

    fn has(plan: &CreatePlan, step: usize) -> bool {
        if step == 0 { !plan.attached } else { plan.start.is_some() }
    }

    fn locks(plan: &CreatePlan) -> Vec<String> {
        vec![lock(plan.instance.id)]
    }

    /// A definition: its disk is there already, and it is off.
    fn at_once(plan: &mut CreatePlan, tx: &mut Tx) -> Result<bool> {
        if Self::has(plan, 0) || Self::has(plan, 1) {
            return Ok(false);
        }
        plan.instance.lifecycle = Lifecycle::Ready;
        plan.begin(tx);
        Ok(true)
    }

    fn begin(plan: &CreatePlan, _engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        plan.begin(tx);
        Ok(())
    }

    async fn run(
        cx: &StepContext,
        plan: &CreatePlan,
        outputs: &mut CreateOutputs,
        step: usize,
    ) -> Result<()> {
        let agent = cx.agent(plan.instance.node)?;
        match step {
            0 => {
                let spec = VolumeSpec {
                    id: plan.volume.id,
                    pool: plan.volume.pool,
                    content: plan.volume.content,
                    size: plan.volume.size,
                    source: plan.source.clone(),
                };
                agent.volume_create(&cx.mutate(super::copy::WHOLE), spec).await
            }
            _ => {
                if let Some(start) = &plan.start {
                    cx.engine.ensure_networks(cx, plan.instance.node, &start.networks).await?;
                    let patience = if start.spec.memory.is_some() {
                        super::power::SAVING
                    } else {
                        Duration::from_secs(120)
                    };
                    let project = plan.instance.project;
                    crate::keys::hand_for_start(cx, &*agent, project, &start.spec).await?;
                    let observed = agent.guest_start(&cx.mutate(patience), start.spec.clone()).await?;
                    outputs.observed = Some(observed);
                }
                Ok(())
            }
        }
    }

    async fn undo(cx: &StepContext, plan: &CreatePlan, _outputs: &CreateOutputs, step: usize) -> Result<()> {
        let agent = cx.agent(plan.instance.node)?;
        match step {
            0 => {
                let volume = VolumeRef { pool: plan.volume.pool, volume: plan.volume.id };
                agent.volume_delete(&cx.mutate(Duration::from_secs(300)), volume).await
            }
            _ => {
                if plan.start.is_some() {
                    super::power::force_stop(
                        cx,
                        plan.instance.node,
                        plan.instance.id,
                        plan.instance.generation,
                    )
                    .await?;
                    agent.guest_destroy(&cx.mutate(Duration::from_secs(60)), plan.instance.id).await?;
                }
                Ok(())
            }
        }
    }

    fn commit(plan: &CreatePlan, outputs: &CreateOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let row = engine.instance_row(plan.instance.id)?;
        let mut instance = row.value.clone();
        instance.lifecycle = Lifecycle::Ready;
        if plan.start.is_some() {
            instance = templates::started(&instance).unwrap_or(instance);
        }
        tx.replace(&row, &instance);
        if let Some(observed) = &outputs.observed {
            let records = engine.inventory.read();
            let mut runtime = engine.runtime_of(&records, observed);
            if plan.is_of_file() {
                runtime.since = Some(Since::Memory);
            }
            tx.put(&runtime);
        }
        Ok(())
    }

    fn told(plan: &CreatePlan, _: &CreateOutputs) -> BTreeMap<String, serde_json::Value> {
        plan.is_of_file().then(|| (RESUMED.to_owned(), true.into())).into_iter().collect()
    }

    fn abort(plan: &CreatePlan, _outputs: &CreateOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        super::delete::remove_records(engine, tx, plan.instance.id)
    }

    fn announce(plan: &CreatePlan) -> Vec<(&'static str, String)> {
        plan.announce()
    }
}
