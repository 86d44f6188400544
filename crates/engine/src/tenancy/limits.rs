//! Limits of projects. A transaction that makes a project use more is decided by what is there, and refused when
//! anything else in the project began to use more since that was read: so two that would fit one by one never both pass.

use super::{project_uses, restricted, rules::ProjectRules};
use crate::{Records, db::Tx};
use karst_model::{
    ByteSize, Config, Error, ErrorKind, ProjectId, Result, VolumeId,
    device::Devices,
    instance::{Instance, InstanceKind},
    keys, maximum,
    profile::Profile,
    project::Project,
    spec::{CpuLimit, Limits},
    storage::{Volume, VolumeContent, VolumeOwner},
};
use std::collections::BTreeMap;

/// What a transaction is about to change in a project.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Planned<'a> {
    /// An instance as it is to be: a new one, or in place of the one with its id.
    pub instance: Option<&'a Instance>,
    /// A profile as it is to be.
    pub profile: Option<&'a Profile>,
    /// The size that the root disk of `instance` is to have at least, where its record does not say it yet.
    pub root: Option<ByteSize>,
    /// A custom volume as it is to be: a new one, or in place of the one with its id.
    pub volume: Option<&'a Volume>,
    /// New custom volumes beside it.
    pub more: &'a [Volume],
    /// A custom volume that goes when `volume` is there.
    pub replaced: Option<VolumeId>,
    /// Networks more than now.
    pub networks: u64,
}

/// Is a volume larger with `after` than with `before`? Without a size it is without limit.
pub(crate) fn grows(before: Option<ByteSize>, after: Option<ByteSize>) -> bool {
    match (before, after) {
        (Some(before), Some(after)) => after > before,
        (before, after) => before != after,
    }
}

/// What a project uses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProjectUsage {
    /// Containers.
    pub containers: u64,
    /// Virtual machines.
    pub machines: u64,
    /// Sum of `limits.cpu`.
    pub cpu: u64,
    /// Sum of `limits.memory`, bytes.
    pub memory: u64,
    /// Sum of `limits.processes`.
    pub processes: u64,
    /// Sum of sizes of root disks and custom volumes, bytes.
    pub disk: u64,
    /// As `disk`, by pool.
    pub pools: BTreeMap<String, u64>,
    /// Networks.
    pub networks: u64,
    /// Instances and volumes without the setting that a limit sums up: the name of the setting, and whose it is.
    missing: Vec<(&'static str, String)>,
    /// Instances whose memory is a share of their host's, which nobody can sum up.
    shares: Vec<String>,
}

/// The configuration and devices of an instance, with one profile as it is to be.
pub(crate) fn expanded(
    records: &Records,
    instance: &Instance,
    changed: Option<&Profile>,
) -> (Config, Devices) {
    let profiles = instance.profiles.iter().filter_map(|id| match changed.filter(|p| p.id == *id) {
        Some(p) => Some((&p.config, &p.devices)),
        None => records.profiles.get(id).map(|p| (&p.config, &p.devices)),
    });
    karst_model::profile::expand(instance.kind, profiles, (&instance.config, &instance.devices))
}

/// Limits that a running guest has apart from its record; none where it has those of its record. What was set aside for it at its start
/// it has until its end, whatever the record says by now.
fn held_limits(records: &Records, instance: &Instance) -> Option<Limits> {
    let run = records.runtimes.get(&instance.id).and_then(|r| r.applied.as_ref())?;
    let keys = ["limits.cpu", "limits.memory", maximum::MEMORY, "limits.processes"];
    // All of them, for they have to fit each other.
    let keys = match keys.iter().any(|key| run.held.contains(*key)) {
        true => &keys[..],
        false if run.config.contains_key(maximum::MEMORY) => &keys[1..3],
        false => return None,
    };
    let has = keys.iter().filter_map(|key| Some(((*key).to_owned(), run.config.get(*key)?.clone())));
    Some(keys::limits(&has.collect()).unwrap_or_default())
}

/// The instances of a project as they are to be.
fn instances<'a>(
    records: &'a Records,
    project: ProjectId,
    planned: &Planned<'a>,
) -> impl Iterator<Item = &'a Instance> {
    let changed = planned.instance.filter(|i| i.project == project);
    let others = records.instances.values().map(|row| &row.value);
    others.filter(move |i| i.project == project && changed.is_none_or(|c| c.id != i.id)).chain(changed)
}

impl ProjectUsage {
    fn of(records: &Records, project: ProjectId, planned: &Planned<'_>) -> Self {
        let mut usage = Self::default();
        for instance in instances(records, project, planned) {
            usage.add(records, instance, planned);
        }
        let changed = planned.volume.filter(|v| v.project == project);
        let stays = |v: &Volume| changed.is_none_or(|c| c.id != v.id) && planned.replaced != Some(v.id);
        let others = records.volumes.values().map(|row| &row.value);
        let more = planned.more.iter().filter(|v| v.project == project);
        let all = others.filter(|v| v.project == project && stays(v)).chain(changed).chain(more);
        for volume in all.filter(|v| v.owner == VolumeOwner::Custom) {
            let pool = records.pools.get(&volume.pool).map_or("", |p| p.name.as_str());
            match volume.size {
                Some(size) => usage.add_disk(pool, size.0),
                None if volume.content == VolumeContent::Filesystem => {
                    usage.missing.push(("size", format!("volume {:?}", volume.name)));
                }
                None => {}
            }
        }
        // What is made for an instance, or was left of it, beside its root: a root that goes to another pool has its room there
        // from the beginning. In sum it is what it was.
        for volume in records.volumes.values() {
            let VolumeOwner::Instance { instance } = &volume.owner else { continue };
            let changed = planned.instance.filter(|i| i.id == *instance);
            let Some(owner) = changed.or_else(|| records.instances.get(instance).map(|row| &row.value))
            else {
                continue;
            };
            if owner.project == project && owner.root != volume.id {
                let pool = records.pools.get(&volume.pool).map_or("", |p| p.name.as_str());
                usage.add_in_pool(pool, volume.size.map_or(0, |size| size.0));
            }
        }
        usage.networks =
            planned.networks + records.networks.values().filter(|n| n.project == project).count() as u64;
        usage
    }

    fn add_disk(&mut self, pool: &str, bytes: u64) {
        self.disk = self.disk.saturating_add(bytes);
        self.add_in_pool(pool, bytes);
    }

    fn add_in_pool(&mut self, pool: &str, bytes: u64) {
        let sum = self.pools.entry(pool.to_owned()).or_default();
        *sum = sum.saturating_add(bytes);
    }

    fn add(&mut self, records: &Records, instance: &Instance, planned: &Planned<'_>) {
        let (config, devices) = expanded(records, instance, planned.profile);
        let who = || format!("instance {:?}", &*instance.name);
        match instance.kind {
            InstanceKind::Container => self.containers += 1,
            InstanceKind::VirtualMachine => self.machines += 1,
        }
        // What was checked when it was written parses; what does not adds nothing and is missing.
        let mut limits = keys::limits(&config).unwrap_or_default();
        // What is set aside a guest can have, whatever its balloon is to hold of it.
        let set_aside =
            |limits: &Limits| limits.memory.map(|m| limits.memory_maximum.map_or(m, |most| most.max(m)));
        limits.memory = set_aside(&limits);
        if let Some(run) = held_limits(records, instance) {
            // Of what runs and what is defined, the larger: the one is there now, the other at the next start.
            let count = |cpu: &Option<CpuLimit>| match cpu {
                Some(CpuLimit::Count { n }) => u64::from(*n),
                Some(CpuLimit::Set { cpus }) => cpus.len() as u64,
                None => 0,
            };
            let more = set_aside(&run);
            limits.memory = limits.memory.map(|size| more.map_or(size, |more| size.max(more)));
            if limits.cpu.is_some() && count(&run.cpu) > count(&limits.cpu) {
                limits.cpu = run.cpu;
            }
            limits.processes = limits.processes.map(|n| run.processes.map_or(n, |more| n.max(more)));
        }
        match limits.cpu {
            Some(CpuLimit::Count { n }) => self.cpu += u64::from(n),
            Some(CpuLimit::Set { cpus }) => self.cpu += cpus.len() as u64,
            None => self.missing.push(("limits.cpu", who())),
        }
        match (limits.memory, limits.memory_share) {
            (Some(m), _) => self.memory = self.memory.saturating_add(m.0),
            (None, Some(percent)) => self.shares.push(format!("{} has {percent}%", who())),
            (None, None) => self.missing.push(("limits.memory", who())),
        }
        match (limits.processes, instance.kind) {
            (Some(n), _) => self.processes += u64::from(n),
            (None, InstanceKind::Container) => self.missing.push(("limits.processes", who())),
            (None, InstanceKind::VirtualMachine) => {}
        }
        let root = devices
            .values()
            .find(|d| d.get("type").is_some_and(|t| t == "disk") && d.get("path").is_some_and(|p| p == "/"));
        let written = root.and_then(|d| d.get("size")).filter(|s| !s.is_empty());
        let written = written.and_then(|s| ByteSize::parse("size", s).ok());
        let there = records.volumes.get(&instance.root);
        let recorded = there.and_then(|v| v.size);
        let recorded =
            recorded.max(planned.root.filter(|_| planned.instance.is_some_and(|i| i.id == instance.id)));
        let pool = root.and_then(|d| d.get("pool")).map_or("", String::as_str);
        // The pool's default is that of disks which are not there yet.
        let of_pool = |content| records.pool(pool).ok().filter(|_| there.is_none())?.root_size(content);
        let size = match instance.kind {
            // A disk that grew stays so, whatever a profile says later.
            InstanceKind::VirtualMachine => {
                let size = written.max(recorded).or_else(|| of_pool(VolumeContent::Block));
                Some(size.unwrap_or(crate::compute::create::DEFAULT_VM_DISK))
            }
            InstanceKind::Container => written.or(recorded).or_else(|| of_pool(VolumeContent::Filesystem)),
        };
        if root.is_some_and(|d| d.get("source").is_some_and(|s| !s.is_empty())) {
            // A custom volume, which counts as such.
            return;
        }
        match size {
            Some(size) => self.add_disk(pool, size.0),
            None => self.missing.push(("size", format!("the root disk of {}", who()))),
        }
    }

    /// Every limit of `rules` with its key, its unit and what is used of it.
    fn against(&self, rules: &ProjectRules) -> Vec<(String, Option<u64>, u64, Option<&'static str>)> {
        let l = &rules.limits;
        let mut all = vec![
            ("containers".into(), l.containers, self.containers, None),
            ("cpu".into(), l.cpu, self.cpu, Some("limits.cpu")),
            ("disk".into(), l.disk, self.disk, Some("size")),
            ("instances".into(), l.instances, self.containers + self.machines, None),
            ("memory".into(), l.memory, self.memory, Some("limits.memory")),
            ("networks".into(), l.networks, self.networks, None),
            ("processes".into(), l.processes, self.processes, Some("limits.processes")),
            ("virtual-machines".into(), l.machines, self.machines, None),
        ];
        for (pool, limit) in &l.pools {
            let used = self.pools.get(pool).copied().unwrap_or_default();
            all.push((format!("disk.pool.{pool}"), Some(*limit), used, Some("size")));
        }
        all
    }

    fn demand_within(&self, rules: &ProjectRules, project: &str) -> Result<()> {
        for (name, limit, used, needs) in self.against(rules) {
            let Some(limit) = limit else { continue };
            if let Some((key, who)) = self.missing.iter().find(|(key, _)| Some(*key) == needs) {
                let at = if *key == "size" { "devices.root.size".into() } else { format!("config.{key}") };
                return Err(Error::invalid(
                    at,
                    format!(
                        "{who} has no {key}, and project {project:?} demands one because it has limits.{name}; set it, or in a profile"
                    ),
                ));
            }
            if let Some(share) = self.shares.first().filter(|_| name == "memory") {
                let text = format!(
                    "{share} of its host's memory, and project {project:?} sums up sizes because it has limits.memory; give it a \
                     size such as 2GiB, or in a profile"
                );
                return Err(Error::invalid("config.limits.memory", text));
            }
            if used > limit {
                let show = |n: u64| match name.starts_with("disk") || name == "memory" {
                    true => ByteSize(n).to_string(),
                    false => n.to_string(),
                };
                return Err(Error::new(
                    ErrorKind::Quota,
                    format!(
                        "project {project:?} would use {} of limits.{name}, which is {}",
                        show(used),
                        show(limit)
                    ),
                ));
            }
        }
        Ok(())
    }
}

/// What a project uses now, beside its limits: name, limit, use.
pub(crate) fn state(records: &Records, project: &Project) -> Vec<(String, Option<u64>, u64)> {
    let rules = ProjectRules::parse(&project.config).unwrap_or_default();
    let usage = ProjectUsage::of(records, project.id, &Planned::default());
    usage.against(&rules).into_iter().map(|(name, limit, used, _)| (name, limit, used)).collect()
}

/// Admits what is planned in a project, in the transaction that does it: within its limits and restrictions, as long as
/// nothing else begins to use more of it meanwhile.
///
/// # Errors
/// Quota and invalid, naming the limit and who lacks a setting; forbidden, naming the restriction.
pub(crate) fn admit(records: &Records, tx: &mut Tx, project: ProjectId, planned: &Planned<'_>) -> Result<()> {
    let row = records.projects.get(&project).ok_or_else(|| Error::not_found("the project is gone"))?;
    let rules = ProjectRules::parse(&row.config)?;
    tx.expect(row);
    if let Some(instance) = planned.instance {
        let (config, devices) = expanded(records, instance, planned.profile);
        restricted::check(&rules, Some(instance.kind), &config, &devices)?;
    }
    for volume in planned.volume.into_iter().chain(planned.more) {
        restricted::check_pool(&rules, records.pools.get(&volume.pool).map_or("", |p| p.name.as_str()))?;
    }
    if let Some(profile) = planned.profile.filter(|p| p.project == project) {
        restricted::check(&rules, None, &profile.config, &profile.devices)?;
    }
    if planned.profile.is_some() {
        for instance in instances(records, project, planned) {
            let (config, devices) = expanded(records, instance, planned.profile);
            let of = planned.profile.map_or(project, |p| p.project);
            let who = || crate::compute::called(of, instance);
            restricted::check(&rules, Some(instance.kind), &config, &devices)
                .map_err(|e| Error { message: format!("{}: {}", who(), e.message), ..e })?;
        }
    }
    if rules.limits != Default::default() {
        tx.expect_untouched(records, &project_uses(project));
        ProjectUsage::of(records, project, planned).demand_within(&rules, &row.name)?;
    }
    tx.touch(&project_uses(project));
    Ok(())
}

/// Demands that what is in a project conforms to `rules`, which it is to have.
pub(crate) fn demand_conforming(
    records: &Records,
    tx: &mut Tx,
    project: &Project,
    rules: &ProjectRules,
) -> Result<()> {
    tx.expect_untouched(records, &project_uses(project.id));
    for profile in records.profiles.values().filter(|p| p.project == project.id) {
        restricted::check(rules, None, &profile.config, &profile.devices)
            .map_err(|e| Error { message: format!("profile {:?}: {}", &*profile.name, e.message), ..e })?;
    }
    for instance in instances(records, project.id, &Planned::default()) {
        let (config, devices) = expanded(records, instance, None);
        restricted::check(rules, Some(instance.kind), &config, &devices)
            .map_err(|e| Error { message: format!("instance {:?}: {}", &*instance.name, e.message), ..e })?;
    }
    ProjectUsage::of(records, project.id, &Planned::default()).demand_within(rules, &project.name)
}
