//! QEMU's monitor, for who administers hosts: commands and events as far as each host's own policy grants them. What a
//! command does is neither known nor undone here; the audit log has it.

use crate::{Engine, audit::AuditRequest, context::Context};
use karst_agent::{CallContext, DirtyRateRequest, MonitorCommand};
use karst_model::{
    Error, Result,
    access::Permission,
    guest::{DirtyRateMode, MonitorAnswer},
    instance::{InstanceKind, Status},
};
use std::{os::fd::OwnedFd, time::Duration};

const CALL: Duration = Duration::from_secs(60);
/// The command that runs a line of the monitor for people.
const HUMAN: &str = "human-monitor-command";
/// Longest text of a command's arguments, bytes.
const LONGEST: usize = 256 << 10;

impl Engine {
    /// Runs a command of QEMU's monitor in a running virtual machine.
    ///
    /// # Errors
    /// Forbidden to all but administrators, and by the host's policy, which the error names; not found, conflict when it
    /// does not run, unsupported for a container, invalid, timeout.
    pub async fn machine_monitor(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        command: &str,
        arguments: serde_json::Value,
    ) -> Result<MonitorAnswer> {
        context.demand_server(Permission::ServerEdit)?;
        // Also of one that is frozen, or that an error halted: these are what people look at.
        let view = self.instance(context, project, name)?;
        if view.instance.kind != InstanceKind::VirtualMachine {
            return Err(Error::unsupported(format!("instance {name:?} is a container; QEMU runs none")));
        }
        if view.status == Status::Stopped {
            return Err(Error::conflict(format!("instance {name:?} is not running; start it first")));
        }
        let agent = self.inner().agents.get(view.instance.node)?;
        if !arguments.is_object() {
            return Err(Error::invalid("arguments", "the arguments of a command are an object"));
        }
        let text = arguments.to_string();
        if text.len() > LONGEST || command.len() > 256 {
            return Err(Error::too_large(format!("a command has at most {} KiB", LONGEST >> 10)));
        }
        // Of a line for people's monitor its first word is the command; what follows may be a secret, as all arguments may.
        let line = arguments.get("command-line").and_then(serde_json::Value::as_str);
        let word = line.filter(|_| command == HUMAN).and_then(|line| line.split_whitespace().next());
        let asked = match word {
            Some(word) => format!("{command}: {}", word.chars().take(64).collect::<String>()),
            None => command.to_owned(),
        };
        let request = MonitorCommand { instance: view.instance.id, command: command.into(), arguments };
        let outcome = agent.machine_monitor(&CallContext::read(CALL), request).await;
        let (said, detail) = match &outcome {
            Ok(_) => ("done", asked),
            Err(e) => ("failed", format!("{asked}: {e}")),
        };
        let request = AuditRequest {
            what: "command of QEMU's monitor".into(),
            object: name.into(),
            project: project.into(),
            outcome: said,
            detail,
        };
        self.audit(context, request);
        outcome
    }

    /// Follows the events of QEMU's monitors of all machines: a descriptor for each host, that reads lines of
    /// [`MonitorEvent`](karst_model::guest::MonitorEvent).
    ///
    /// # Errors
    /// Forbidden to all but administrators, and by a host's policy, which the error names; unavailable.
    pub async fn machine_events(&self, context: &Context) -> Result<Vec<OwnedFd>> {
        context.demand_server(Permission::ServerEdit)?;
        let mut all = vec![];
        for (_, agent) in self.inner().agents.all() {
            all.extend(agent.machine_events(&CallContext::read(CALL), ()).await?.fds);
        }
        Ok(all)
    }

    /// Begins to measure how fast a running virtual machine writes memory; its figures say it then.
    ///
    /// # Errors
    /// Not found, conflict when it does not run or is being measured, unsupported for a container, invalid, forbidden.
    pub async fn machine_dirty_rate(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        (seconds, mode): (u32, DirtyRateMode),
    ) -> Result<()> {
        let (view, agent) = self.virtual_machine(context, project, name)?;
        let request = DirtyRateRequest { instance: view.instance.id, seconds, mode };
        agent.machine_dirty_rate(&CallContext::read(CALL), request).await
    }
}
