//! What beyond the life of a guest this driver can do: hardware, states, quiescing, files.

use super::*;

#[async_trait]
impl GuestMachine for QemuDriver {
    async fn grow(&self, instance: InstanceId, path: &Path, size: u64) -> Result<()> {
        let machine = self.shared.machine(instance).await?;
        let slot = self.shared.slot(instance);
        let _changing = slot.changing.lock().await;
        let found = machine
            .record()
            .devices
            .as_ref()
            .and_then(|d| d.disks.iter().find(|d| d.path == path).map(|d| d.slot.clone()));
        let slot = found.ok_or_else(|| Error::not_found("the guest has no such disk"))?;
        plug::grow(&machine, &slot, size).await
    }

    async fn state_save(&self, instance: InstanceId, snapshot: SnapshotId, memory: bool) -> Result<()> {
        let dir = self.shared.dir(instance);
        if !dir.is_dir() || states::there(&dir, snapshot) {
            return Ok(());
        }
        let machine = match self.shared.machine(instance).await {
            Err(e) if e.is(ErrorKind::NotFound) => None,
            other => Some(other?),
        };
        let slot = self.shared.slot(instance);
        let _changing = slot.changing.lock().await;
        let place = states::begin(&dir, snapshot)?;
        if memory {
            // Nor of one that an error halted: it would have to go on from there.
            let pausing = |m: &Arc<Machine>| m.now().state == RuntimeState::Paused && !m.record().kept_halted;
            let machine = machine.filter(pausing);
            let machine =
                machine.ok_or_else(|| Error::conflict("memory is kept of a machine that is paused"))?;
            if still::marked(&dir).is_some() {
                return Err(Error::conflict(
                    "the file systems of the guest are still: whoever starts with that memory may find them so for ever; \
                     try again when they go on",
                ));
            }
            copies::demand_none(&machine).await?;
            backups::demand_none(&machine).await?;
            memory_files::demand_none(&machine)?;
            saved::save(&machine, &place).await?;
        }
        files(move || states::complete(&dir, snapshot)).await
    }

    async fn state_restore(&self, instance: InstanceId, snapshot: SnapshotId, memory: bool) -> Result<()> {
        let dir = self.shared.dir(instance);
        let slot = self.shared.slot(instance);
        let _changing = slot.changing.lock().await;
        if keeper::is_alive(&dir) {
            return Err(Error::conflict("the guest is running; stop it first"));
        }
        files(move || states::restore(&dir, snapshot, memory)).await
    }

    async fn state_delete(&self, instance: InstanceId, snapshot: SnapshotId) -> Result<()> {
        let dir = self.shared.dir(instance);
        files(move || states::delete(&dir, snapshot)).await
    }

    async fn state_read(&self, instance: InstanceId, at: Option<SnapshotId>) -> Result<MachineFiles> {
        let dir = self.shared.dir(instance);
        let slot = self.shared.slot(instance);
        let _changing = slot.changing.lock().await;
        files(move || states::read(&dir, at)).await
    }

    async fn state_write(
        &self,
        instance: InstanceId,
        at: Option<SnapshotId>,
        state: MachineFiles,
    ) -> Result<()> {
        let dir = self.shared.dir(instance);
        let slot = self.shared.slot(instance);
        let _changing = slot.changing.lock().await;
        if at.is_none() && keeper::is_alive(&dir) {
            return Err(Error::conflict("the guest is running; stop it first"));
        }
        files(move || states::write(&dir, at, &state)).await
    }

    async fn memory_drop(&self, instance: InstanceId) -> Result<()> {
        let dir = self.shared.dir(instance);
        let slot = self.shared.slot(instance);
        let _changing = slot.changing.lock().await;
        if keeper::is_alive(&dir) {
            return Err(Error::conflict("the guest is running; stop it first"));
        }
        files(move || if dir.is_dir() { saved::discard(&dir) } else { Ok(()) }).await
    }

    async fn figures(&self, instance: InstanceId) -> Result<MachineFigures> {
        figures::of(&*self.shared.machine(instance).await?).await
    }

    async fn interrupt(&self, instance: InstanceId) -> Result<()> {
        figures::interrupt(&*self.shared.machine(instance).await?).await
    }

    async fn wake(&self, instance: InstanceId) -> Result<()> {
        figures::wake(&*self.shared.machine(instance).await?).await
    }

    async fn monitor(
        &self,
        instance: InstanceId,
        command: &str,
        arguments: serde_json::Value,
    ) -> Result<MonitorAnswer> {
        monitor::run(&*self.shared.machine(instance).await?, command, arguments).await
    }

    fn monitor_events(&self) -> broadcast::Receiver<MonitorEvent> {
        self.shared.heard.subscribe()
    }

    async fn set_threshold(&self, instance: InstanceId, slot: &str, bytes: u64) -> Result<()> {
        threshold::set(&*self.shared.machine(instance).await?, slot, bytes).await
    }

    fn thresholds(&self) -> broadcast::Receiver<ThresholdReached> {
        self.shared.reached.subscribe()
    }

    fn news(&self) -> broadcast::Receiver<MachineNews> {
        self.shared.news.subscribe()
    }

    async fn set_memory_period(&self, instance: InstanceId, seconds: u32) -> Result<()> {
        figures::set_memory_period(&*self.shared.machine(instance).await?, seconds).await
    }

    async fn measure_dirty_rate(
        &self,
        instance: InstanceId,
        seconds: u32,
        mode: karst_model::guest::DirtyRateMode,
    ) -> Result<()> {
        monitor::measure_dirty_rate(&*self.shared.machine(instance).await?, seconds, mode).await
    }

    async fn agent(
        &self,
        instance: InstanceId,
        command: &str,
        arguments: serde_json::Value,
        limit: Duration,
    ) -> Result<serde_json::Value> {
        self.shared.inside(instance).await?.1.command(command, arguments, limit).await
    }

    async fn reset(&self, instance: InstanceId) -> Result<()> {
        display::reset(&*self.shared.machine(instance).await?).await
    }

    async fn press(&self, instance: InstanceId, chords: &[Vec<String>]) -> Result<()> {
        display::press(&*self.shared.machine(instance).await?, chords).await
    }

    async fn screenshot(&self, instance: InstanceId) -> Result<OwnedFd> {
        display::screenshot(&*self.shared.machine(instance).await?).await
    }

    async fn display(
        &self,
        instance: InstanceId,
        protocol: DisplayProtocol,
        guard: Option<&DisplayGuard>,
    ) -> Result<OwnedFd> {
        display::attach(&*self.shared.machine(instance).await?, protocol, guard).await
    }

    async fn port(&self, instance: InstanceId, port: &str) -> Result<OwnedFd> {
        ports::attach(&*self.shared.machine(instance).await?, port).await
    }

    async fn guard_display(&self, instance: InstanceId, guard: Option<&DisplayGuard>) -> Result<()> {
        display::guard(&*self.shared.machine(instance).await?, guard).await
    }
}

#[async_trait]
impl Quiesce for QemuDriver {
    async fn freeze(&self, instance: InstanceId, limit: Duration) -> Result<u32> {
        let limit = limit.min(Duration::from_millis(karst_guest_agent::message::MAX_FREEZE.into()));
        still::freeze(&self.shared.machine(instance).await?, limit).await
    }

    async fn thaw(&self, instance: InstanceId) -> Result<u32> {
        let machine = self.shared.machine(instance).await?;
        match machine.now().state {
            RuntimeState::Paused => Err(Error::conflict("the guest is frozen; resume it first")),
            _ => still::thaw(&machine).await,
        }
    }
}

/// By the guest's agent; so only while it runs.
#[async_trait]
impl GuestFiles for QemuDriver {
    async fn open(&self, instance: InstanceId, _root: Option<&Path>, path: &str) -> Result<OpenedFile> {
        self.shared.inside(instance).await?.1.open(path).await
    }

    async fn write(
        &self,
        instance: InstanceId,
        _root: Option<&Path>,
        request: FileWrite,
        content: Option<OwnedFd>,
    ) -> Result<()> {
        self.shared.inside(instance).await?.1.write(request, content).await
    }

    async fn delete(&self, instance: InstanceId, _root: Option<&Path>, path: &str) -> Result<()> {
        self.shared.inside(instance).await?.1.delete(path).await
    }
}
