//! CPUs and memory of a guest as libvirt counts them: a container without limits has those of its host.

use crate::{calls::connect::facts, error::VirError, session::Call};
use karst_engine::InstanceView;
use karst_model::{
    Config,
    board::Board,
    instance::InstanceKind,
    keys, spec,
    threads::{self, Thread},
};

/// Memory of a virtual machine that says nothing, bytes.
const MACHINE_MEMORY: u64 = 1 << 30;
const TOPOLOGY: &str = "hardware.cpu.topology";

/// Limits of a guest.
pub struct Limits {
    kind: InstanceKind,
    limits: spec::Limits,
    /// How many processors its topology has, where it says one.
    room: Option<u32>,
}

/// Those of a guest: what it runs with, else what it will start with.
///
/// # Errors
/// Invalid, when its configuration is.
pub fn of(view: &InstanceView) -> Result<Limits, VirError> {
    of_config(view.instance.kind, view.run().map_or(&view.expanded_config, |run| &run.config))
}

/// Those of a configuration.
///
/// # Errors
/// Invalid, when it is.
pub fn of_config(kind: InstanceKind, config: &Config) -> Result<Limits, VirError> {
    let says_topology = config.get(TOPOLOGY).is_some_and(|text| !text.is_empty());
    let topology = if says_topology { Board::of(config)?.topology } else { None };
    Ok(Limits { kind, limits: keys::limits(config)?, room: topology.map(|t| t.processors()) })
}

impl Limits {
    /// CPUs.
    ///
    /// # Errors
    /// Those of asking for the host's.
    pub fn cpus(&self, call: &Call) -> Result<u32, VirError> {
        match (&self.limits.cpu, self.kind) {
            (Some(spec::CpuLimit::Count { n }), _) => Ok(*n),
            (Some(spec::CpuLimit::Set { cpus }), _) => Ok(cpus.len() as u32),
            (None, InstanceKind::VirtualMachine) => Ok(1),
            (None, InstanceKind::Container) => Ok(facts(call)?.cpus),
        }
    }

    /// CPUs that it can have, which is what a topology has.
    ///
    /// # Errors
    /// Those of asking for the host's.
    pub fn most_cpus(&self, call: &Call) -> Result<u32, VirError> {
        let now = self.cpus(call)?;
        Ok(self.room.or(self.limits.cpu_maximum).map_or(now, |most| most.max(now)))
    }

    /// Does a topology say how many CPUs it can have?
    pub fn topology(&self) -> Option<u32> {
        self.room
    }

    /// CPUs of the host that it is pinned to: those of its threads that are not pinned apart.
    pub fn pinned(&self) -> Option<&[u32]> {
        self.runs_on(Thread::Default)
    }

    /// CPUs of the host that a thread of it is pinned to.
    pub fn runs_on(&self, thread: Thread) -> Option<&[u32]> {
        threads::pinned(&self.limits.pins, thread).or_else(|| self.set())
    }

    /// CPUs of the host that `limits.cpu` names.
    pub fn set(&self) -> Option<&[u32]> {
        match &self.limits.cpu {
            Some(spec::CpuLimit::Set { cpus }) => Some(cpus),
            _ => None,
        }
    }

    /// The memory that it can have, KiB: what is set aside for a machine.
    ///
    /// # Errors
    /// Those of asking for the host's.
    pub fn most_memory_kib(&self, call: &Call) -> Result<u64, VirError> {
        let now = self.memory_kib(call)?;
        let most = self.limits.memory_maximum.map(|size| size.round_up(1 << 20).bytes() / 1024);
        Ok(most.map_or(now, |most| most.max(now)))
    }

    /// Memory in KiB.
    ///
    /// # Errors
    /// Those of asking for the host's.
    pub fn memory_kib(&self, call: &Call) -> Result<u64, VirError> {
        let memory = match self.limits.memory_share {
            Some(_) => self.limits.memory_on(facts(call)?.memory),
            None => self.limits.memory,
        };
        let bytes = match (memory, self.kind) {
            // What a balloon leaves is as it was said; a machine as such is of whole MiB.
            (Some(size), InstanceKind::VirtualMachine) if self.limits.memory_maximum.is_some() => {
                size.bytes()
            }
            (Some(size), InstanceKind::VirtualMachine) => size.round_up(1 << 20).bytes(),
            (Some(size), InstanceKind::Container) => size.bytes(),
            (None, InstanceKind::VirtualMachine) => MACHINE_MEMORY,
            (None, InstanceKind::Container) => facts(call)?.memory,
        };
        Ok(bytes / 1024)
    }
}
