//! What is made of jobs and refusals, and of a QEMU that answers late, breaks off, or does what nobody heard of.

use super::*;
use crate::machine::without_owner;
use std::{
    collections::BTreeSet,
    sync::{Mutex, MutexGuard},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixListener,
};

fn jobs(job: Value) -> Value {
    let other = json!({"type": "mirror", "device": "copy-scsi10", "len": 9, "offset": 9, "ready": true, "status": "ready"});
    json!([other, job])
}

#[test]
fn a_job_is_told_by_its_slot_and_says_how_far_it_is() {
    let said = |status: &str, ready: bool, error: Option<&str>| {
        let mut job = json!({
            "type": "mirror", "device": "copy-scsi1", "len": 100, "offset": 40, "speed": 7, "ready": ready,
            "status": status, "auto-dismiss": false, "io-status": "ok", "busy": true, "paused": false,
        });
        if let Some(error) = error {
            job["error"] = error.into();
        }
        Job::of(&jobs(job), "scsi1").unwrap()
    };
    let running = said("running", false, None).state();
    assert_eq!(
        (running.phase, running.done, running.total, running.speed),
        (DiskCopyPhase::Copying, 40, 100, 7)
    );
    assert_eq!(said("ready", true, None).state().phase, DiskCopyPhase::Ready);
    assert_eq!(said("concluded", true, None).state().phase, DiskCopyPhase::Ready, "its end was broken off");
    let full = said("concluded", false, Some("No space left on device")).state().phase;
    assert!(matches!(full, DiskCopyPhase::Failed { reason } if reason.contains("no space left")));
    // Of one that goes on an error is only what it met.
    assert_eq!(said("running", false, Some("x")).state().phase, DiskCopyPhase::Copying);
    assert_eq!(Job::of(&jobs(json!({"device": "copy-scsi1x"})), "scsi1"), None);
    assert_eq!(Job::of(&json!({}), "scsi1"), None);
}

#[test]
fn refusals_name_what_to_do() {
    let said = |text: &str| refused(Error::internal("QEMU refused", format!("GenericError: {text}")));
    let sizes = said("Source and target image have different sizes");
    assert!(sizes.is(ErrorKind::Invalid) && sizes.field.as_deref() == Some("to"), "{sizes:?}");
    assert!(said("Failed to get \"write\" lock").is(ErrorKind::Conflict));
    assert!(said("else").is(ErrorKind::Internal));
}

#[tokio::test]
async fn what_is_written_down_outlives_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (VolumeId(uuid::Uuid::from_u128(1)), VolumeId(uuid::Uuid::from_u128(2)));
    let disk = disk("scsi0", Path::new("/a"));
    let entry = |to, stage| Copying {
        to,
        slot: "scsi0".into(),
        side: Side::Second,
        disk: disk.clone(),
        stage,
        resume: false,
        merge: None,
    };
    put(dir.path(), &entry(one, Stage::Pivoted)).await.unwrap();
    put(dir.path(), &entry(two, Stage::Pivoting)).await.unwrap();
    let phase = async |to| state(dir.path(), None, to).await.unwrap().phase;
    assert_eq!((phase(one).await, phase(two).await), (DiskCopyPhase::Pivoted, DiskCopyPhase::Gone));

    // It goes on from the first, which nothing takes back; of the second nothing came.
    end(dir.path(), None, one, DiskCopyEnd::Pivot).await.unwrap();
    for how in [DiskCopyEnd::Cancel, DiskCopyEnd::Finish] {
        assert!(end(dir.path(), None, one, how).await.unwrap_err().is(ErrorKind::Conflict), "{how:?}");
    }
    assert!(end(dir.path(), None, two, DiskCopyEnd::Pivot).await.unwrap_err().is(ErrorKind::Conflict));
    for _ in 0..2 {
        end(dir.path(), None, two, DiskCopyEnd::Cancel).await.unwrap();
    }
    assert_eq!(read(dir.path()).unwrap(), [entry(one, Stage::Pivoted)]);
    clear(dir.path()).unwrap();
    assert_eq!(phase(one).await, DiskCopyPhase::Gone);
    clear(dir.path()).unwrap();
}

fn disk(slot: &str, path: &Path) -> ResolvedDisk {
    karst_guest::samples::disk("root", slot, path, karst_guest::DiskFormat::Raw)
}

fn volume(n: u128) -> VolumeId {
    VolumeId(uuid::Uuid::from_u128(n))
}

const SLOT: &str = "virtio0";

/// What a QEMU has, that copies its one disk.
#[derive(Default)]
struct Qemu {
    driven: Side,
    /// Status and error of the job.
    job: Option<(&'static str, Option<&'static str>)>,
    nodes: BTreeSet<String>,
    /// Commands of it, and what the machine's owner was asked.
    said: Vec<String>,
    /// What it does, and closes the connection instead of an answer.
    silent_at: Option<&'static str>,
    /// The same of what comes after the next `job-complete`.
    silent_then: Option<&'static str>,
    /// It refuses to break the job off.
    busy: bool,
    /// What it was asked to complete fails.
    fails: bool,
    /// A change-over is quicker than who breaks it off.
    late: bool,
    /// `job-complete` comes to its end at once.
    quick: bool,
    /// The job makes files of the disk one: the device drives the same node afterwards.
    merges: bool,
}

impl Qemu {
    fn has(&self, what: &str) -> bool {
        self.said.iter().any(|s| s == what)
    }

    /// The machine goes on from the copy.
    fn complete(&mut self) {
        if !self.merges {
            self.driven = self.driven.other();
        }
        self.job = Some(("concluded", None));
    }

    fn run(&mut self, command: &str, arguments: &Value) -> std::result::Result<Value, &'static str> {
        let text = |key: &str| arguments[key].as_str().unwrap_or_default().to_owned();
        match command {
            "query-block" => return Ok(json!([{"inserted": {"node-name": self.driven.name('d', SLOT)}}])),
            "query-block-jobs" => {
                let told = |(status, error): &(&str, Option<&str>)| {
                    let ready = *status == "ready";
                    let mut job =
                        json!({"device": id(SLOT), "status": status, "ready": ready, "len": 1, "offset": 1});
                    if let Some(error) = error {
                        job["error"] = (*error).into();
                    }
                    job
                };
                return Ok(self.job.iter().map(told).collect());
            }
            "query-named-block-nodes" => {
                let node = |name: &String| json!({"node-name": name, "image": {"virtual-size": 1 << 20}});
                return Ok(self.nodes.iter().map(node).collect());
            }
            "qom-list" | "query-fdsets" => return Ok(json!([])),
            "blockdev-add" => drop(self.nodes.insert(text("node-name"))),
            "blockdev-del" if self.job.is_some_and(|(status, _)| status != "concluded") => {
                return Err("Node is in use");
            }
            "blockdev-del" => drop(self.nodes.remove(&text("node-name"))),
            "block-commit" | "block-stream" => {
                self.merges = true;
                self.job = Some(("running", None));
            }
            "blockdev-mirror" => self.job = Some(("running", None)),
            "block-job-cancel" if self.late => self.complete(),
            "block-job-cancel" if self.busy => return Err("Job is busy"),
            "block-job-cancel" => self.job = Some(("concluded", Some("Operation canceled"))),
            "job-complete" => {
                if self.quick {
                    self.complete();
                }
                if self.fails {
                    self.job = Some(("concluded", Some("Input/output error")));
                }
                if self.silent_then.is_some() {
                    self.silent_at = self.silent_then.take();
                }
            }
            "job-dismiss" => self.job = None,
            _ => {}
        }
        Ok(json!({}))
    }

    /// Nothing: it closes the connection.
    fn answer(&mut self, line: &str) -> Option<String> {
        let asked: Value = serde_json::from_str(line).unwrap();
        let command = asked["execute"].as_str().unwrap();
        self.said.push(command.to_owned());
        let silent = self.silent_at.take_if(|at| *at == command).is_some();
        let mut answer = match self.run(command, &asked["arguments"]) {
            Ok(value) => json!({"return": value}),
            Err(text) => json!({"error": {"class": "GenericError", "desc": text}}),
        };
        answer["id"] = asked["id"].clone();
        (!silent).then(|| format!("{answer}\n"))
    }
}

/// A machine of such a QEMU.
struct Place {
    dir: tempfile::TempDir,
    machine: Arc<Machine>,
    qemu: Arc<Mutex<Qemu>>,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let qemu = Arc::new(Mutex::new(Qemu { quick: true, ..Default::default() }));
        qemu.lock().unwrap().nodes.insert(Side::First.name('d', SLOT));
        let listener = UnixListener::bind(dir.path().join(launch::QMP)).unwrap();
        tokio::spawn(Self::serve(listener, qemu.clone()));
        let (machine, mut asked) = without_owner(dir.path().to_owned());
        let machine = Arc::new(machine);
        for name in ["old", "new"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        machine.record().root = dir.path().join("old");
        machine.record().devices = Some(crate::record::Devices {
            machine: "q35".into(),
            ports: 8,
            display: false,
            disks: vec![disk(SLOT, &dir.path().join("old"))],
            nics: vec![],
        });
        let (owned, said) = (machine.clone(), qemu.clone());
        tokio::spawn(async move {
            while let Some((ask, reply)) = asked.recv().await {
                said.lock().unwrap().said.push(format!("{ask:?}"));
                let state = if ask == Ask::Pause { RuntimeState::Paused } else { RuntimeState::Running };
                owned.observed.send_modify(|o| o.state = state);
                let _ = reply.send(Ok(()));
            }
        });
        Self { dir, machine, qemu }
    }

    async fn serve(listener: UnixListener, qemu: Arc<Mutex<Qemu>>) {
        while let Ok((stream, _)) = listener.accept().await {
            let (read, mut write) = stream.into_split();
            let mut lines = BufReader::new(read).lines();
            let mut answer = Some("{\"QMP\": {}}\n".to_owned());
            while let Some(text) = answer {
                if write.write_all(text.as_bytes()).await.is_err() {
                    break;
                }
                let Ok(Some(line)) = lines.next_line().await else { break };
                answer = qemu.lock().unwrap().answer(&line);
            }
        }
    }

    fn qemu(&self) -> MutexGuard<'_, Qemu> {
        self.qemu.lock().unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn copy(&self) -> DiskCopy {
        DiskCopy {
            to: volume(1),
            from: self.path("old"),
            path: self.path("new"),
            format: karst_guest::DiskFormat::Raw,
            backing: None,
            speed: 0,
            synchronous: false,
        }
    }

    /// A copy that is ready.
    async fn ready(&self) {
        begin(&self.machine, self.copy()).await.unwrap();
        self.qemu().job = Some(("ready", None));
    }

    async fn end(&self, how: DiskCopyEnd) -> Result<()> {
        end(self.dir.path(), Some(&self.machine), volume(1), how).await
    }

    async fn phase(&self) -> DiskCopyPhase {
        state(self.dir.path(), Some(&self.machine), volume(1)).await.unwrap().phase
    }

    fn entry(&self) -> Option<Copying> {
        find(self.dir.path(), volume(1)).unwrap()
    }

    fn runs(&self) -> bool {
        self.machine.now().state == RuntimeState::Running
    }
}

#[tokio::test]
async fn a_begin_that_qemu_did_unheard_leaves_nothing() {
    let place = Place::new();
    place.qemu().silent_at = Some("blockdev-mirror");
    let lost = begin(&place.machine, place.copy()).await.unwrap_err();
    assert!(lost.is(ErrorKind::Unavailable), "{lost}");
    {
        let qemu = place.qemu();
        assert_eq!((qemu.job, qemu.nodes.len()), (None, 1), "{:?}", qemu.said);
    }
    assert_eq!(place.entry(), None);
    demand_none(&place.machine).await.unwrap();

    // What cannot be taken back at once is known, and a cancel ends it.
    {
        let mut qemu = place.qemu();
        qemu.silent_at = Some("blockdev-mirror");
        qemu.busy = true;
    }
    begin(&place.machine, place.copy()).await.unwrap_err();
    assert_eq!(place.phase().await, DiskCopyPhase::Copying);
    assert!(demand_none(&place.machine).await.unwrap_err().is(ErrorKind::Conflict));
    place.qemu().busy = false;
    place.end(DiskCopyEnd::Cancel).await.unwrap();
    assert_eq!(place.entry(), None);
    {
        let qemu = place.qemu();
        assert_eq!((qemu.job, qemu.nodes.len()), (None, 1), "{:?}", qemu.said);
    }

    // One that nobody knows of does not keep the next from being made.
    place.qemu().job = Some(("running", None));
    place.ready().await;
    assert_eq!(place.phase().await, DiskCopyPhase::Ready);
    place.end(DiskCopyEnd::Pivot).await.unwrap();
    assert_eq!(place.phase().await, DiskCopyPhase::Pivoted);
    assert!(place.runs());
    assert_eq!(place.machine.record().root, place.path("new"));
}

#[tokio::test]
async fn a_machine_stands_still_until_a_change_over_that_was_asked_for_is_over() {
    // What comes after the word cannot be seen: the job comes to its end all the same, later.
    let place = Place::new();
    place.ready().await;
    {
        let mut qemu = place.qemu();
        qemu.quick = false;
        qemu.silent_then = Some("query-block-jobs");
    }
    assert!(place.end(DiskCopyEnd::Pivot).await.unwrap_err().is(ErrorKind::Unavailable));
    assert!(place.qemu().has("job-complete"));
    assert!(!place.runs(), "it may go over at any time");
    assert_eq!(place.entry().unwrap().stage, Stage::Pivoting);
    place.qemu().complete();
    place.end(DiskCopyEnd::Pivot).await.unwrap();
    assert_eq!(place.entry().unwrap().stage, Stage::Pivoted);
    assert!(place.runs());

    // Nothing was asked for: it runs on from its disk.
    let place = Place::new();
    place.ready().await;
    place.qemu().silent_at = Some("query-block");
    assert!(place.end(DiskCopyEnd::Pivot).await.unwrap_err().is(ErrorKind::Unavailable));
    assert!(place.runs() && !place.qemu().has("job-complete"));
    assert_eq!(place.phase().await, DiskCopyPhase::Ready);

    // It came to an end that is none: it runs on as well.
    place.qemu().quick = false;
    place.qemu().fails = true;
    assert!(place.end(DiskCopyEnd::Pivot).await.unwrap_err().is(ErrorKind::Conflict));
    assert!(place.runs());
    assert!(matches!(place.phase().await, DiskCopyPhase::Failed { .. }));
    place.end(DiskCopyEnd::Cancel).await.unwrap();
    assert_eq!(place.entry(), None);
}

#[tokio::test]
async fn nothing_leads_back_from_a_change_over_that_nobody_saw() {
    for how in [DiskCopyEnd::Finish, DiskCopyEnd::Cancel] {
        for late in [false, true] {
            let place = Place::new();
            place.ready().await;
            // The machine stands still, and QEMU does it now or as soon as it is asked for something else.
            let mut entry = place.entry().unwrap();
            (entry.stage, entry.resume) = (Stage::Pivoting, true);
            put(place.dir.path(), &entry).await.unwrap();
            place.machine.ask(Ask::Pause).await.unwrap();
            match late {
                true => place.qemu().late = true,
                false => place.qemu().complete(),
            }
            let over = place.end(how).await.unwrap_err();
            assert!(
                over.is(ErrorKind::Conflict) && over.message.contains("already"),
                "{how:?} {late}: {over}"
            );
            assert_eq!(place.phase().await, DiskCopyPhase::Pivoted, "{how:?} {late}");
            assert!(place.runs());
            assert_eq!(place.machine.record().root, place.path("new"));
        }
    }
}

#[tokio::test]
async fn a_change_over_that_cannot_be_written_down_is_told_of() {
    let place = Place::new();
    place.ready().await;
    // What the machine is written down in cannot be made.
    let new = place.path("machine.json.new");
    std::fs::create_dir(&new).unwrap();
    place.end(DiskCopyEnd::Pivot).await.unwrap_err();
    assert!(!place.runs(), "nothing is on disk that says what counts");
    assert_eq!(place.entry().unwrap().stage, Stage::Pivoting);
    assert_eq!(place.phase().await, DiskCopyPhase::Pivoted, "nothing leads back");
    assert!(place.end(DiskCopyEnd::Cancel).await.is_err() && !place.runs());
    std::fs::remove_dir(&new).unwrap();
    place.end(DiskCopyEnd::Pivot).await.unwrap();
    assert!(place.runs());
    assert_eq!(place.phase().await, DiskCopyPhase::Pivoted);
}

#[tokio::test]
async fn a_pivot_that_nobody_waits_for_any_more_comes_to_its_end() {
    let place = Place::new();
    place.ready().await;
    place.qemu().quick = false;
    let slot = Arc::<Slot>::default();
    let begin_to_end = |how| {
        let (dir, machine) = (place.dir.path().to_owned(), place.machine.clone());
        tokio::spawn(end_for_good(slot.clone(), dir, Some(machine), volume(1), how))
    };
    let until = async |what: &str, is: &dyn Fn() -> bool| {
        let limit = Instant::now() + Duration::from_secs(20);
        while !is() {
            assert!(Instant::now() < limit, "{what}: {:?}", place.qemu().said);
            sleep(Duration::from_millis(10)).await;
        }
    };
    let waits = begin_to_end(DiskCopyEnd::Pivot);
    until("the change-over is asked for", &|| place.qemu().has("job-complete")).await;
    // A cancel that has its turn after it, and of which nobody wants anything then.
    let cancels = begin_to_end(DiskCopyEnd::Cancel);
    tokio::task::yield_now().await;
    for gone in [waits, cancels] {
        gone.abort();
        assert!(gone.await.unwrap_err().is_cancelled());
    }
    assert!(!place.runs());
    place.qemu().complete();
    until("it runs again", &|| place.runs()).await;
    let _turn = slot.changing.lock().await;
    assert_eq!(place.phase().await, DiskCopyPhase::Pivoted);
    assert!(place.runs() && !place.qemu().has("block-job-cancel"));
}

impl Place {
    /// Its disk has layers: `old` (raw), `middle`, and `new`, to which the guest writes.
    fn layered() -> Self {
        let place = Self::new();
        std::fs::write(place.path("middle"), "").unwrap();
        let lower =
            |number, name: &str, format| karst_guest::LowerFile { number, path: place.path(name), format };
        let (raw, qcow2) = (karst_guest::DiskFormat::Raw, karst_guest::DiskFormat::Qcow2);
        {
            let mut record = place.machine.record();
            record.root = place.path("new");
            let disk = &mut record.devices.as_mut().unwrap().disks[0];
            (disk.path, disk.format, disk.chain.number) = (place.path("new"), qcow2, 5);
            disk.chain.below = vec![lower(2, "middle", qcow2), lower(0, "old", raw)];
        }
        for number in [0, 2, 5] {
            for kind in ['f', 'i'] {
                place.qemu().nodes.insert(Side::First.of_layer(kind, SLOT, number));
            }
        }
        place
    }

    async fn merge(&self, merge: karst_model::layer::Merge) -> Result<()> {
        let path = self.machine.record().root.clone();
        merges::begin(&self.machine, karst_guest::DiskMerge { volume: volume(1), path, merge, speed: 0 })
            .await
    }

    fn disk(&self) -> ResolvedDisk {
        self.machine.record().devices.as_ref().unwrap().disks[0].clone()
    }

    fn numbers(&self) -> Vec<u32> {
        let disk = self.disk();
        let below = disk.chain.below.iter().rev().map(|f| f.number);
        below.chain([disk.chain.number]).collect()
    }
}

#[tokio::test]
async fn the_active_layer_goes_when_it_is_on_disk_that_it_does() {
    use karst_model::layer::{Base, Merge};
    let place = Place::layered();
    let commit = Merge::Commit { top: 5, base: Base::Lowest };
    for _ in 0..2 {
        place.merge(commit).await.unwrap();
    }
    assert_eq!(place.qemu().said.iter().filter(|s| *s == "block-commit").count(), 1, "twice is once");
    assert_eq!(place.phase().await, DiskCopyPhase::Copying);
    assert!(place.end(DiskCopyEnd::Pivot).await.unwrap_err().is(ErrorKind::Conflict), "it is not ready");
    place.qemu().job = Some(("ready", None));
    assert_eq!(place.phase().await, DiskCopyPhase::Ready);
    for _ in 0..2 {
        place.end(DiskCopyEnd::Pivot).await.unwrap();
    }
    let said = place.qemu().said.clone();
    let at = |word: &str| said.iter().position(|s| s.starts_with(word)).unwrap();
    assert!(at("Pause") < at("job-complete") && at("job-complete") < at("stop"), "{said:?}");
    assert!(at("stop") < at("Resume"), "it is flushed while the machine stands still: {said:?}");
    assert_eq!((place.disk().path, place.numbers()), (place.path("old"), vec![0]));
    assert_eq!(
        (place.disk().format, place.machine.record().root.clone()),
        (karst_guest::DiskFormat::Raw, place.path("old"))
    );
    assert_eq!(place.phase().await, DiskCopyPhase::Pivoted);
    assert!(place.end(DiskCopyEnd::Cancel).await.unwrap_err().is(ErrorKind::Conflict), "nothing leads back");
    let left: Vec<String> = place.qemu().nodes.iter().cloned().collect();
    assert_eq!(left, ["d-virtio0", "f-virtio0", "i-virtio0"]);
}

#[tokio::test]
async fn what_does_not_take_the_active_layer_is_over_when_it_has_ended() {
    use karst_model::layer::{Base, Merge};
    for (merge, left) in [
        (Merge::Commit { top: 2, base: Base::Lowest }, vec![0, 5]),
        (Merge::Pull { base: Some(Base::Lowest) }, vec![0, 5]),
        (Merge::Pull { base: None }, vec![5]),
    ] {
        let place = Place::layered();
        place.merge(merge).await.unwrap();
        assert_eq!(place.phase().await, DiskCopyPhase::Copying, "{merge:?}");
        place.qemu().job = Some(("concluded", None));
        assert_eq!(place.phase().await, DiskCopyPhase::Pivoted, "{merge:?}");
        assert!(place.end(DiskCopyEnd::Cancel).await.is_err(), "{merge:?}: the nodes are gone already");
        place.end(DiskCopyEnd::Pivot).await.unwrap();
        assert_eq!((place.numbers(), place.disk().path), (left, place.path("new")), "{merge:?}");
        assert!(place.runs());
        assert!(!place.qemu().nodes.contains("i-virtio0.l2"), "{merge:?}");
    }
}

#[tokio::test]
async fn a_merge_that_fails_or_is_broken_off_leaves_the_disk_as_it_was() {
    use karst_model::layer::{Base, Merge};
    let commit = Merge::Commit { top: 5, base: Base::Layer(2) };
    let place = Place::layered();
    let before = place.qemu().nodes.clone();
    place.merge(commit).await.unwrap();
    assert!(demand_none(&place.machine).await.unwrap_err().is(ErrorKind::Conflict));
    let other = place.merge(Merge::Pull { base: None }).await.unwrap_err();
    assert!(other.is(ErrorKind::Conflict), "{other}");
    place.end(DiskCopyEnd::Cancel).await.unwrap();
    assert_eq!((place.numbers(), place.entry(), &place.qemu().nodes), (vec![0, 2, 5], None, &before));

    place.merge(commit).await.unwrap();
    place.qemu().job = Some(("concluded", Some("No space left on device")));
    assert!(matches!(place.phase().await, DiskCopyPhase::Failed { reason } if reason.contains("no space")));
    assert!(place.end(DiskCopyEnd::Pivot).await.unwrap_err().is(ErrorKind::Conflict));
    assert!(place.runs());
    place.end(DiskCopyEnd::Cancel).await.unwrap();
    assert_eq!((place.numbers(), &place.qemu().nodes), (vec![0, 2, 5], &before));

    // What is no merge of this disk never begins.
    for wrong in
        [Merge::Commit { top: 9, base: Base::Lowest }, Merge::Commit { top: 2, base: Base::Layer(5) }]
    {
        place.merge(wrong).await.unwrap_err();
    }
    assert_eq!(place.entry(), None);
}

#[tokio::test]
async fn a_machine_that_dies_at_its_pivot_begins_from_what_is_written_down() {
    use karst_model::layer::{Base, Merge};
    let place = Place::layered();
    place.merge(Merge::Commit { top: 5, base: Base::Layer(2) }).await.unwrap();
    place.qemu().job = Some(("ready", None));
    assert_eq!(state(place.dir.path(), None, volume(1)).await.unwrap().phase, DiskCopyPhase::Gone);
    let gone = end(place.dir.path(), None, volume(1), DiskCopyEnd::Pivot).await.unwrap_err();
    assert!(gone.is(ErrorKind::Conflict), "{gone}");
    assert_eq!(merges::merged(place.dir.path()).unwrap(), [], "nothing is left of it yet");
    place.end(DiskCopyEnd::Pivot).await.unwrap();
    assert_eq!(state(place.dir.path(), None, volume(1)).await.unwrap().phase, DiskCopyPhase::Pivoted);
    end(place.dir.path(), None, volume(1), DiskCopyEnd::Pivot).await.unwrap();
    let left = karst_guest::MergedDisk { volume: volume(1), before: vec![0, 2, 5], gone: vec![5] };
    assert_eq!(merges::merged(place.dir.path()).unwrap(), [left]);
}
