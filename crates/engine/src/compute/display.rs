//! Displays of virtual machines, and their passwords.
//!
//! A password is in a record of its own, sealed with its machine's id; the host keeps none. Each attachment brings it along, so
//! nothing has to be set again after a restart of the machine or of a daemon. A running machine is told of a change at once, for
//! those who are being asked for the password just then.

use super::guest::ExecSession;
use crate::{
    Engine, EngineInner, InstanceView, context::Context, screens::ScreenListener, secrets::SecretValue,
};
use karst_agent::{CallContext, DisplayGuardSet, DisplayGuarded, SpiceChannel};
use karst_model::{
    Error, InstanceId, Result,
    access::Permission,
    display::{DisplayGuard, DisplayLock, DisplayPassword, DisplayProtocol},
    instance::InstanceKind,
};
use std::{net::SocketAddr, time::Duration};

const CALL: Duration = Duration::from_secs(60);

/// What is told of a display to who may see the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DisplayState {
    /// It has one.
    pub there: bool,
    /// Viewers are asked for a password.
    pub password: bool,
    /// Until when the password lets them in.
    pub valid_to: Option<jiff::Timestamp>,
    /// What listens for viewers of the running machine, or would.
    pub listeners: Vec<ScreenListener>,
}

/// Which password it is, which is sealed with it.
fn whose(instance: InstanceId) -> String {
    format!("karst display {instance}")
}

fn demand_display(view: &InstanceView) -> Result<()> {
    let name = &*view.instance.name;
    match &view.instance.hardware {
        _ if view.instance.kind != InstanceKind::VirtualMachine => Err(Error::unsupported(format!(
            "instance {name:?} is a container; only virtual machines have a screen, a keyboard and a reset button"
        ))),
        Some(hardware) if hardware.display => Ok(()),
        _ => Err(Error::unsupported(format!("virtual machine {name:?} was made without a display"))),
    }
}

impl EngineInner {
    /// What viewers of a machine's display have to know; `None`: nothing.
    fn display_guard(&self, instance: InstanceId) -> Result<Option<DisplayGuard>> {
        let row = self.inventory.read().display_locks.get(&instance).cloned();
        let Some(row) = row else { return Ok(None) };
        let value = self.vault.with_key(|key| key.open_for(whose(instance), &row.sealed)).map_err(|e| {
            let text = format!("the password of the display cannot be read: {}", e.message);
            Error::new(e.kind, text)
        })?;
        let text = String::from_utf8_lossy(value.bytes()).into_owned();
        let password = DisplayPassword::parse("password", text)?;
        Ok(Some(DisplayGuard { password, valid_to: row.valid_to }))
    }
}

impl Engine {
    /// Has a machine a display, and does that ask for a password? The password itself: [`Engine::display_password`].
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn display_state(&self, context: &Context, project: &str, name: &str) -> Result<DisplayState> {
        let view = self.find(context, project, name, Permission::ProjectView)?;
        let there = view.instance.hardware.as_ref().is_some_and(|h| h.display);
        let records = self.inner().inventory.read();
        let lock = records.display_locks.get(&view.instance.id);
        let listeners = self.inner().screens.of(view.instance.id);
        Ok(DisplayState {
            there,
            password: lock.is_some(),
            valid_to: lock.and_then(|l| l.valid_to),
            listeners,
        })
    }

    /// The password of a machine's display, for who may change it.
    ///
    /// # Errors
    /// Not found, forbidden; unavailable without the key that it was sealed with.
    pub fn display_password(
        &self,
        context: &Context,
        project: &str,
        name: &str,
    ) -> Result<Option<DisplayGuard>> {
        let view = self.find(context, project, name, Permission::ResourceEdit)?;
        self.inner().display_guard(view.instance.id)
    }

    /// Demands that passwords can be kept, before anything is done that would be half done without.
    ///
    /// # Errors
    /// Unavailable, when this server has no key for secrets; forbidden.
    pub fn display_passwords_kept(&self, context: &Context, project: &str) -> Result<()> {
        self.project(context, project, Permission::ResourceEdit)?;
        self.inner().vault.with_key(|_| Ok(()))
    }

    /// Sets the password of a machine's display, or takes it away. It counts at once: who is let in already stays, who is being
    /// asked for the password has to know the new one.
    ///
    /// # Errors
    /// Not found, unsupported without a display, unavailable without a key for secrets, conflict for a machine that runs since
    /// before displays could have a password; forbidden.
    pub async fn display_password_set(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        guard: Option<DisplayGuard>,
    ) -> Result<()> {
        let view = self.find(context, project, name, Permission::ResourceEdit)?;
        demand_display(&view)?;
        let (inner, id) = (self.inner(), view.instance.id);
        let sealed = match &guard {
            Some(guard) => {
                let value = SecretValue::new(guard.password.text().as_bytes().to_vec())?;
                Some(inner.vault.with_key(|key| key.seal_for(&*inner.env, whose(id), &value))?)
            }
            None => None,
        };
        // The host first: should it refuse, nothing has changed. What it knows beyond the record lasts to the next viewer.
        if view.status.is_up() {
            let agent = inner.agents.get(view.instance.node)?;
            let request = DisplayGuardSet { instance: id, guard: guard.clone() };
            agent.display_guard(&CallContext::read(CALL), request).await?;
        }
        let valid_to = guard.and_then(|g| g.valid_to);
        inner
            .transact(|records, tx| {
                let gone = || Error::not_found(format!("instance {name:?} not found"));
                let instance = records.instances.get(&id).ok_or_else(gone)?;
                let old = records.display_locks.get(&id);
                let new = sealed.clone().map(|sealed| DisplayLock { instance: id, sealed, valid_to });
                match (old, &new) {
                    (None, None) => return Ok(()),
                    (None, Some(new)) => tx.create(new),
                    (Some(old), Some(new)) => tx.replace(old, new),
                    (Some(old), None) => tx.delete(old),
                }
                tx.expect(instance);
                Ok(())
            })
            .await?;
        let path = super::path(&view.project.name, &view.instance.name);
        inner.announce(context, Some(view.project.id), "instance-updated", path);
        Ok(())
    }

    /// Attaches to the display of a running virtual machine: one descriptor, both ways, that speaks this protocol, and asks for
    /// the password if there is one. Viewers that speak SPICE want several. `unasked`: who may change the machine could take the
    /// password away, and is not asked.
    ///
    /// # Errors
    /// Those of [`Engine::machine_screenshot`]; conflict when the password is not valid any more; unsupported for SPICE where the
    /// machine was started without.
    pub async fn machine_display(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        protocol: DisplayProtocol,
        unasked: bool,
    ) -> Result<ExecSession> {
        let viewer = context.principal().identity.describe();
        self.attach_display(context, (project, name), protocol, (unasked, false), viewer).await
    }

    /// The same for a viewer that came over the network; `guarded`: only where there is a password.
    pub(crate) async fn screen_for(
        &self,
        context: &Context,
        (project, name): (&str, &str),
        protocol: DisplayProtocol,
        guarded: bool,
        peer: SocketAddr,
    ) -> Result<ExecSession> {
        let viewer = format!("{} of {peer}", protocol.as_str());
        self.attach_display(context, (project, name), protocol, (false, guarded), viewer).await
    }

    async fn attach_display(
        &self,
        context: &Context,
        (project, name): (&str, &str),
        protocol: DisplayProtocol,
        (unasked, only_guarded): (bool, bool),
        viewer: String,
    ) -> Result<ExecSession> {
        let (view, agent) = self.virtual_machine(context, project, name)?;
        let (inner, instance) = (self.inner(), view.instance.id);
        let trusted = unasked && context.principal().may(Permission::ResourceEdit, Some(view.project.id));
        let guard = if trusted { None } else { inner.display_guard(instance)? };
        if let Some(end) = guard.as_ref().and_then(|g| g.valid_to).filter(|end| *end <= inner.env.now()) {
            return Err(Error::conflict(format!(
                "the password of the display of {name:?} was valid until {end}; set a new one"
            )));
        }
        let guarded = guard.is_some();
        if only_guarded && !guarded {
            return Err(Error::forbidden(format!("the display of {name:?} has no password any more")));
        }
        let call = CallContext::read(CALL);
        let answer = match (protocol, guard) {
            (DisplayProtocol::Vnc, None) => agent.display_attach(&call, instance).await?,
            (DisplayProtocol::Vnc, Some(guard)) => {
                agent.display_attach_guarded(&call, DisplayGuarded { instance, guard }).await?
            }
            (DisplayProtocol::Spice, guard) => {
                agent.display_attach_spice(&call, SpiceChannel { instance, guard }).await?
            }
        };
        let session = self.viewer(viewer, &view, (protocol, guarded), (agent, answer.value));
        Ok(ExecSession { fds: answer.fds, session })
    }
}
