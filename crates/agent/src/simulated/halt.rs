//! Machines that an error halts, such as a full disk: their process lives, with their disks open, and stands still until somebody
//! resumes it. One that is paused then is kept so until it is resumed, and is halted as before after that.

use super::{SimulatedAgent, state::Guest};
use karst_model::{
    Error, InstanceId, Result,
    instance::{HaltReason, RuntimeState},
};

impl SimulatedAgent {
    /// A machine that runs is halted by an error. Answers whether it ran.
    pub fn halt_guest(&self, instance: InstanceId, why: HaltReason) -> bool {
        let mut state = self.settled();
        let found = state.guests.get_mut(&instance);
        let Some(guest) = found.filter(|g| g.state == RuntimeState::Running) else {
            return false;
        };
        (guest.state, guest.halt) = (RuntimeState::Error, Some(why));
        let observed = guest.observed();
        drop(state);
        self.publish(observed);
        true
    }

    /// Process id of a guest that has a process, be it that it stands still.
    pub fn pid_of(&self, instance: InstanceId) -> Option<u32> {
        self.settled().guests.get(&instance).filter(|g| g.runs()).map(|g| g.pid)
    }
}

impl Guest {
    /// It stands still, or goes on.
    pub(super) fn freeze(&mut self, frozen: bool) {
        self.state = match (frozen, self.state) {
            (true, _) => RuntimeState::Paused,
            // It was kept halted.
            (false, RuntimeState::Paused) if self.halt.is_some() => RuntimeState::Error,
            (false, _) => {
                self.halt = None;
                RuntimeState::Running
            }
        };
    }

    /// What only one whose processors run can do.
    pub(super) fn demand_not_halted(&self) -> Result<()> {
        match self.state {
            RuntimeState::Error => {
                Err(Error::conflict("the guest is halted by an error; resume it or force it to stop"))
            }
            _ => Ok(()),
        }
    }
}
