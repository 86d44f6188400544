//! QEMU's monitor of simulated machines: the few commands that say or change what is simulated, all of which the host grants;
//! and what else QEMU tells while a machine runs.

use super::{
    state::{Guest, State},
    work::no_guest,
};
use crate::{
    calls::{DirtyRateRequest, MonitorCommand, WithFds},
    thresholds::DiskThresholdSet,
};
use karst_model::{
    Error, InstanceId, Result,
    guest::{DirtyRate, DirtyRateMode, MemoryInside, MonitorAnswer, MonitorEvent, ThresholdReached},
    instance::RuntimeState,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde_json::{Map, json};
use std::{fs::File, io::Write};

impl State {
    /// Runs a command.
    pub fn monitor(&mut self, request: MonitorCommand, second: i64) -> Result<MonitorAnswer> {
        let MonitorCommand { instance, command, arguments } = request;
        let guest = self.guests.get_mut(&instance).ok_or_else(|| no_guest(instance))?;
        super::work::demand_machine(guest)?;
        if !arguments.is_object() {
            return Err(Error::invalid("command", "a command has a name and an object of arguments"));
        }
        self.monitored.insert(instance, guest.pid);
        let status = |state| match state {
            RuntimeState::Paused => "paused",
            RuntimeState::Error => "io-error",
            _ => "running",
        };
        let mut event = None;
        let value = match command.as_str() {
            "query-status" => {
                json!({"status": status(guest.state), "running": guest.state == RuntimeState::Running, "singlestep": false})
            }
            "human-monitor-command" => match arguments["command-line"].as_str() {
                Some("info status") => json!(format!("VM status: {}\r\n", status(guest.state))),
                other => json!(format!("unknown command: '{}'\r\n", other.unwrap_or_default())),
            },
            "stop" | "cont" => {
                (guest.state, event) = match command.as_str() {
                    "stop" => (RuntimeState::Paused, Some("STOP")),
                    _ => {
                        guest.halt = None;
                        (RuntimeState::Running, Some("RESUME"))
                    }
                };
                json!({})
            }
            other => {
                return Ok(MonitorAnswer::Refused {
                    class: "CommandNotFound".into(),
                    description: format!("The command {other} has not been found"),
                });
            }
        };
        if let Some(event) = event {
            self.tell(instance, event, second);
        }
        Ok(MonitorAnswer::Returned(value))
    }

    fn tell(&mut self, instance: InstanceId, event: &str, seconds: i64) {
        let event = MonitorEvent { instance, event: event.into(), data: Map::new(), seconds, micros: 0 };
        let Ok(mut line) = serde_json::to_vec(&event) else { return };
        line.push(b'\n');
        self.followers.retain_mut(|follower| follower.write_all(&line).is_ok());
    }

    /// A descriptor that reads the events from now on.
    pub fn follow(&mut self) -> Result<WithFds<()>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(std::io::Error::from)?;
        self.followers.push(File::from(ours));
        Ok(WithFds { value: (), fds: vec![theirs] })
    }

    /// Sets the threshold of a disk, or takes it away.
    pub fn set_threshold(&mut self, request: DiskThresholdSet) -> Result<()> {
        let DiskThresholdSet { guest, slot, bytes } = request;
        let machine = self.running(guest)?;
        super::work::demand_machine(machine)?;
        let pid = machine.pid;
        let spec = &machine.spec;
        let only_read = match spec.disks.iter().find(|d| d.slot == slot) {
            Some(disk) => disk.readonly,
            None if spec.root.slot == slot => false,
            None => return Err(Error::invalid("slot", "the guest has no such disk")),
        };
        if only_read {
            return Err(Error::unsupported("a disk that is only read is never written"));
        }
        match bytes {
            0 => drop(self.thresholds.remove(&(guest.instance, slot))),
            bytes => drop(self.thresholds.insert((guest.instance, slot), (pid, bytes))),
        }
        Ok(())
    }

    /// The thresholds of a machine that something reaches which writes all over its disks.
    pub fn reach_thresholds(&mut self, instance: InstanceId) -> Vec<ThresholdReached> {
        let Some(pid) = self.guests.get(&instance).map(|g| g.pid) else { return vec![] };
        let mut reached = vec![];
        self.thresholds.retain(|(of, slot), (start, threshold)| {
            if *of != instance {
                return true;
            }
            // Those of an earlier start ended with it.
            if *start == pid {
                let (slot, threshold) = (slot.clone(), *threshold);
                reached.push(ThresholdReached { instance, slot, threshold, excess: 4096 });
            }
            false
        });
        reached
    }

    /// What a system tells of its memory, unless it is not to.
    pub fn memory_inside(&self, instance: InstanceId, guest: &Guest) -> Option<MemoryInside> {
        let total = guest.spec.limits.memory.map_or(1 << 30, karst_model::ByteSize::bytes);
        let told = MemoryInside {
            told_at: guest.started_at + 1,
            total: Some(total),
            free: Some(total / 2),
            available: Some(total / 4 * 3),
            caches: Some(total / 4),
            swapped_in: Some(0),
            swapped_out: Some(4096),
            major_faults: Some(7),
            minor_faults: Some(700),
            ..MemoryInside::default()
        };
        let defined = guest.spec.machine.as_ref().and_then(|m| m.board.balloon_period);
        let period = self.memory_periods.get(&instance).copied().or(defined);
        (period != Some(0)).then_some(told)
    }

    /// Measures at once.
    pub fn measure(&mut self, request: DirtyRateRequest) -> Result<()> {
        let guest = self.guests.get(&request.instance).ok_or_else(|| no_guest(request.instance))?;
        super::work::demand_machine(guest)?;
        if !(1..=60).contains(&request.seconds) {
            return Err(Error::invalid("seconds", "memory is watched for 1 to 60 seconds"));
        }
        self.dirty_rates.insert(request.instance, (guest.pid, request.seconds, request.mode));
        Ok(())
    }

    /// What was measured since this start.
    pub fn dirty_rate(&self, instance: InstanceId, pid: u32) -> Option<DirtyRate> {
        let (_, seconds, mode) = *self.dirty_rates.get(&instance).filter(|(of, ..)| *of == pid)?;
        let processors = if mode == DirtyRateMode::DirtyRing { vec![(0, 3)] } else { vec![] };
        Some(DirtyRate {
            measured: true,
            started: 1,
            seconds: seconds as i32,
            rate: Some(3),
            mode,
            processors,
        })
    }
}
