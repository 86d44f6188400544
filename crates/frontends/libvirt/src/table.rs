//! The one table of procedures: number, what it demands, what answers it. What is not in it answers "not supported", which
//! clients take as a reason to ask in an older way.

use crate::{
    calls::{
        backup, checkpoints, connect, console, copies, cpu, define, devices, domain, event, figures,
        graphics, host, inside, layers, machine, memory, monitor, network, network_update, networks, nodedev,
        nwfilter, plugged, pools, power, secret, sizes, snapshots, stats, storage, threads, transfer, tuning,
        volumes,
    },
    error::{Code, VirError},
    frame::QEMU,
    names::NAMES,
    session::{Answer, Call, Session},
};
use futures::future::BoxFuture;

/// What a procedure demands of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demand {
    /// Nothing: it comes before the connection is opened.
    Handshake,
    /// That it is open.
    See,
    /// That it may change things, although this changes nothing: libvirt lets only those ask, because the answer is of a guest's
    /// inside or takes a program of the host.
    Inspect,
    /// That it may change things.
    Change,
}

/// A procedure.
pub struct Procedure {
    /// Its number.
    pub number: i32,
    /// Its name in the protocol.
    pub name: &'static str,
    /// What it demands.
    pub demand: Demand,
    /// What answers it.
    pub handler: fn(Call) -> BoxFuture<'static, Result<Answer, VirError>>,
}

macro_rules! procedures {
    ($($number:literal $name:ident $demand:ident $handler:path;)*) => {
        &[$(Procedure {
            number: $number,
            name: stringify!($name),
            demand: Demand::$demand,
            handler: |call| Box::pin($handler(call)),
        }),*]
    };
}

/// All of them, by number.
pub const PROCEDURES: &[Procedure] = procedures! {
    1 CONNECT_OPEN Handshake connect::open;
    2 CONNECT_CLOSE Handshake connect::close;
    3 CONNECT_GET_TYPE See connect::get_type;
    4 CONNECT_GET_VERSION See connect::version;
    5 CONNECT_GET_MAX_VCPUS See connect::max_vcpus;
    6 NODE_GET_INFO See connect::node_info;
    7 CONNECT_GET_CAPABILITIES See connect::capabilities;
    8 DOMAIN_ATTACH_DEVICE Change devices::attach;
    9 DOMAIN_CREATE Change power::create;
    10 DOMAIN_CREATE_XML Change define::create_xml;
    11 DOMAIN_DEFINE_XML Change define::define;
    12 DOMAIN_DESTROY Change power::destroy;
    13 DOMAIN_DETACH_DEVICE Change devices::detach;
    14 DOMAIN_GET_XML_DESC See domain::xml;
    15 DOMAIN_GET_AUTOSTART See domain::autostart;
    16 DOMAIN_GET_INFO See domain::info;
    17 DOMAIN_GET_MAX_MEMORY See sizes::max_memory;
    18 DOMAIN_GET_MAX_VCPUS See sizes::max_vcpus;
    19 DOMAIN_GET_OS_TYPE See domain::os_type;
    20 DOMAIN_GET_VCPUS See figures::vcpus;
    21 CONNECT_LIST_DEFINED_DOMAINS See domain::defined_names;
    22 DOMAIN_LOOKUP_BY_ID See domain::by_id;
    23 DOMAIN_LOOKUP_BY_NAME See domain::by_name;
    24 DOMAIN_LOOKUP_BY_UUID See domain::by_uuid;
    25 CONNECT_NUM_OF_DEFINED_DOMAINS See domain::count_defined;
    26 DOMAIN_PIN_VCPU Change threads::pin_vcpu;
    27 DOMAIN_REBOOT Change power::reboot;
    28 DOMAIN_RESUME Change power::resume;
    29 DOMAIN_SET_AUTOSTART Change domain::set_autostart;
    30 DOMAIN_SET_MAX_MEMORY Change sizes::set_max_memory;
    31 DOMAIN_SET_MEMORY Change sizes::set_memory;
    32 DOMAIN_SET_VCPUS Change sizes::set_vcpus;
    33 DOMAIN_SHUTDOWN Change power::shutdown;
    34 DOMAIN_SUSPEND Change power::suspend;
    35 DOMAIN_UNDEFINE Change define::undefine;
    36 CONNECT_LIST_DEFINED_NETWORKS See network::defined_names;
    37 CONNECT_LIST_DOMAINS See domain::ids;
    38 CONNECT_LIST_NETWORKS See network::names;
    39 NETWORK_CREATE Change networks::create;
    40 NETWORK_CREATE_XML Change networks::create_xml;
    41 NETWORK_DEFINE_XML Change networks::define;
    42 NETWORK_DESTROY Change networks::destroy;
    43 NETWORK_GET_XML_DESC See network::xml;
    44 NETWORK_GET_AUTOSTART See network::autostart;
    45 NETWORK_GET_BRIDGE_NAME See network::bridge;
    46 NETWORK_LOOKUP_BY_NAME See network::by_name;
    47 NETWORK_LOOKUP_BY_UUID See network::by_uuid;
    48 NETWORK_SET_AUTOSTART Change networks::set_autostart;
    49 NETWORK_UNDEFINE Change networks::undefine;
    50 CONNECT_NUM_OF_DEFINED_NETWORKS See network::count_defined;
    51 CONNECT_NUM_OF_DOMAINS See domain::count;
    52 CONNECT_NUM_OF_NETWORKS See network::count;
    53 DOMAIN_CORE_DUMP Change memory::dump;
    54 DOMAIN_RESTORE Change memory::restore;
    55 DOMAIN_SAVE Change memory::save;
    56 DOMAIN_GET_SCHEDULER_TYPE See tuning::scheduler_type;
    57 DOMAIN_GET_SCHEDULER_PARAMETERS See tuning::scheduler;
    58 DOMAIN_SET_SCHEDULER_PARAMETERS Change tuning::set_scheduler;
    59 CONNECT_GET_HOSTNAME See connect::hostname;
    60 CONNECT_SUPPORTS_FEATURE Handshake connect::supports_feature;
    64 DOMAIN_BLOCK_STATS See figures::block_stats;
    65 DOMAIN_INTERFACE_STATS See stats::interface;
    66 AUTH_LIST Handshake connect::auth_list;
    71 CONNECT_NUM_OF_STORAGE_POOLS See storage::count;
    72 CONNECT_LIST_STORAGE_POOLS See storage::names;
    73 CONNECT_NUM_OF_DEFINED_STORAGE_POOLS See storage::count_defined;
    74 CONNECT_LIST_DEFINED_STORAGE_POOLS See storage::defined_names;
    75 CONNECT_FIND_STORAGE_POOL_SOURCES Change pools::find_sources;
    76 STORAGE_POOL_CREATE_XML Change pools::create_xml;
    77 STORAGE_POOL_DEFINE_XML Change pools::define;
    78 STORAGE_POOL_CREATE Change pools::create;
    79 STORAGE_POOL_BUILD Change pools::build;
    80 STORAGE_POOL_DESTROY Change pools::destroy;
    81 STORAGE_POOL_DELETE Change pools::delete;
    82 STORAGE_POOL_UNDEFINE Change pools::undefine;
    83 STORAGE_POOL_REFRESH Change pools::refresh;
    84 STORAGE_POOL_LOOKUP_BY_NAME See storage::by_name;
    85 STORAGE_POOL_LOOKUP_BY_UUID See storage::by_uuid;
    86 STORAGE_POOL_LOOKUP_BY_VOLUME See storage::by_volume;
    87 STORAGE_POOL_GET_INFO See storage::info;
    88 STORAGE_POOL_GET_XML_DESC See storage::xml;
    89 STORAGE_POOL_GET_AUTOSTART See storage::autostart;
    90 STORAGE_POOL_SET_AUTOSTART Change pools::set_autostart;
    91 STORAGE_POOL_NUM_OF_VOLUMES See storage::count_volumes;
    92 STORAGE_POOL_LIST_VOLUMES See storage::volume_names;
    93 STORAGE_VOL_CREATE_XML Change volumes::create;
    94 STORAGE_VOL_DELETE Change volumes::delete;
    95 STORAGE_VOL_LOOKUP_BY_NAME See storage::volume_by_name;
    96 STORAGE_VOL_LOOKUP_BY_KEY See storage::volume_by_key;
    97 STORAGE_VOL_LOOKUP_BY_PATH See storage::volume_by_path;
    98 STORAGE_VOL_GET_INFO See storage::volume_info;
    99 STORAGE_VOL_GET_XML_DESC See storage::volume_xml;
    100 STORAGE_VOL_GET_PATH See storage::volume_path;
    101 NODE_GET_CELLS_FREE_MEMORY See host::free_cells;
    102 NODE_GET_FREE_MEMORY See host::free_memory;
    105 CONNECT_DOMAIN_EVENT_REGISTER See event::register;
    106 CONNECT_DOMAIN_EVENT_DEREGISTER See event::deregister;
    110 CONNECT_GET_URI See connect::uri;
    111 NODE_NUM_OF_DEVICES See nodedev::count;
    112 NODE_LIST_DEVICES See nodedev::name_list;
    113 NODE_DEVICE_LOOKUP_BY_NAME See nodedev::by_name;
    114 NODE_DEVICE_GET_XML_DESC See nodedev::xml;
    115 NODE_DEVICE_GET_PARENT See nodedev::parent;
    116 NODE_DEVICE_NUM_OF_CAPS See nodedev::count_kinds;
    117 NODE_DEVICE_LIST_CAPS See nodedev::kinds;
    125 STORAGE_VOL_CREATE_XML_FROM Change volumes::create_from;
    126 CONNECT_NUM_OF_INTERFACES See nodedev::count_interfaces;
    127 CONNECT_LIST_INTERFACES See nodedev::active_interfaces;
    128 INTERFACE_LOOKUP_BY_NAME See nodedev::interface_by_name;
    129 INTERFACE_LOOKUP_BY_MAC_STRING See nodedev::interface_by_mac;
    130 INTERFACE_GET_XML_DESC See nodedev::interface_xml;
    137 CONNECT_NUM_OF_DEFINED_INTERFACES See nodedev::count_idle_interfaces;
    138 CONNECT_LIST_DEFINED_INTERFACES See nodedev::idle_interfaces;
    139 CONNECT_NUM_OF_SECRETS See secret::count;
    140 CONNECT_LIST_SECRETS See secret::uuids;
    141 SECRET_LOOKUP_BY_UUID See secret::by_uuid;
    142 SECRET_DEFINE_XML Change secret::define;
    143 SECRET_GET_XML_DESC See secret::xml;
    144 SECRET_SET_VALUE Change secret::set_value;
    145 SECRET_GET_VALUE Change secret::value;
    146 SECRET_UNDEFINE Change secret::undefine;
    147 SECRET_LOOKUP_BY_USAGE See secret::by_usage;
    149 CONNECT_IS_SECURE See connect::is_secure;
    150 DOMAIN_IS_ACTIVE See domain::is_active;
    151 DOMAIN_IS_PERSISTENT See domain::is_persistent;
    152 NETWORK_IS_ACTIVE See network::is_active;
    153 NETWORK_IS_PERSISTENT See network::is_persistent;
    154 STORAGE_POOL_IS_ACTIVE See storage::is_active;
    155 STORAGE_POOL_IS_PERSISTENT See storage::is_persistent;
    156 INTERFACE_IS_ACTIVE See nodedev::interface_is_active;
    157 CONNECT_GET_LIB_VERSION See connect::lib_version;
    158 CONNECT_COMPARE_CPU See cpu::compare;
    159 DOMAIN_MEMORY_STATS See stats::memory;
    160 DOMAIN_ATTACH_DEVICE_FLAGS Change devices::attach_flags;
    161 DOMAIN_DETACH_DEVICE_FLAGS Change devices::detach_flags;
    162 CONNECT_BASELINE_CPU See cpu::baseline;
    163 DOMAIN_GET_JOB_INFO See backup::job_info;
    164 DOMAIN_ABORT_JOB Change backup::abort;
    165 STORAGE_VOL_WIPE Change volumes::wipe;
    167 CONNECT_DOMAIN_EVENT_REGISTER_ANY See event::register_any;
    168 CONNECT_DOMAIN_EVENT_DEREGISTER_ANY See event::deregister_any;
    174 DOMAIN_UPDATE_DEVICE_FLAGS Change devices::update;
    175 NWFILTER_LOOKUP_BY_NAME See nwfilter::by_name;
    176 NWFILTER_LOOKUP_BY_UUID See nwfilter::by_uuid;
    177 NWFILTER_GET_XML_DESC See nwfilter::xml;
    178 CONNECT_NUM_OF_NWFILTERS See nwfilter::count;
    179 CONNECT_LIST_NWFILTERS See nwfilter::name_list;
    180 NWFILTER_DEFINE_XML Change nwfilter::define;
    181 NWFILTER_UNDEFINE Change nwfilter::undefine;
    182 DOMAIN_MANAGED_SAVE Change machine::managed_save;
    183 DOMAIN_HAS_MANAGED_SAVE_IMAGE See machine::has_managed_save;
    184 DOMAIN_MANAGED_SAVE_REMOVE Change machine::managed_save_remove;
    185 DOMAIN_SNAPSHOT_CREATE_XML Change snapshots::create;
    186 DOMAIN_SNAPSHOT_GET_XML_DESC See snapshots::xml;
    187 DOMAIN_SNAPSHOT_NUM See snapshots::count;
    188 DOMAIN_SNAPSHOT_LIST_NAMES See snapshots::names;
    189 DOMAIN_SNAPSHOT_LOOKUP_BY_NAME See snapshots::by_name;
    190 DOMAIN_HAS_CURRENT_SNAPSHOT See snapshots::has_current;
    191 DOMAIN_SNAPSHOT_CURRENT See snapshots::current;
    192 DOMAIN_REVERT_TO_SNAPSHOT Change snapshots::revert;
    193 DOMAIN_SNAPSHOT_DELETE Change snapshots::delete;
    194 DOMAIN_GET_BLOCK_INFO See devices::block_info;
    196 DOMAIN_CREATE_WITH_FLAGS Change power::create_with_flags;
    197 DOMAIN_SET_MEMORY_PARAMETERS Change tuning::set_memory;
    198 DOMAIN_GET_MEMORY_PARAMETERS See tuning::memory;
    199 DOMAIN_SET_VCPUS_FLAGS Change sizes::set_vcpus_flags;
    200 DOMAIN_GET_VCPUS_FLAGS See sizes::vcpus;
    201 DOMAIN_OPEN_CONSOLE Change console::open;
    202 DOMAIN_IS_UPDATED See domain::is_updated;
    203 CONNECT_GET_SYSINFO See nodedev::sysinfo;
    204 DOMAIN_SET_MEMORY_FLAGS Change sizes::set_memory_flags;
    205 DOMAIN_SET_BLKIO_PARAMETERS Change tuning::set_disks;
    206 DOMAIN_GET_BLKIO_PARAMETERS See tuning::disks;
    208 STORAGE_VOL_UPLOAD Change transfer::upload;
    209 STORAGE_VOL_DOWNLOAD Change transfer::download;
    210 DOMAIN_INJECT_NMI Change figures::inject_nmi;
    211 DOMAIN_SCREENSHOT Change machine::screenshot;
    212 DOMAIN_GET_STATE See domain::state;
    219 DOMAIN_SET_SCHEDULER_PARAMETERS_FLAGS Change tuning::set_scheduler_flags;
    223 DOMAIN_GET_SCHEDULER_PARAMETERS_FLAGS See tuning::scheduler_flags;
    225 DOMAIN_PIN_VCPU_FLAGS Change threads::pin_vcpu_flags;
    226 DOMAIN_SEND_KEY Change machine::send_key;
    227 NODE_GET_CPU_STATS See nodedev::cpu_stats;
    228 NODE_GET_MEMORY_STATS See host::memory_stats;
    229 DOMAIN_GET_CONTROL_INFO See domain::control_info;
    230 DOMAIN_GET_VCPU_PIN_INFO See threads::vcpu_pins;
    231 DOMAIN_UNDEFINE_FLAGS Change define::undefine_flags;
    232 DOMAIN_SAVE_FLAGS Change memory::save_flags;
    233 DOMAIN_RESTORE_FLAGS Change memory::restore_flags;
    234 DOMAIN_DESTROY_FLAGS Change power::destroy_flags;
    235 DOMAIN_SAVE_IMAGE_GET_XML_DESC Change memory::image_xml;
    236 DOMAIN_SAVE_IMAGE_DEFINE_XML Change memory::image_define;
    237 DOMAIN_BLOCK_JOB_ABORT Change copies::abort;
    238 DOMAIN_GET_BLOCK_JOB_INFO See copies::info;
    239 DOMAIN_BLOCK_JOB_SET_SPEED Change copies::set_speed;
    240 DOMAIN_BLOCK_PULL Change layers::pull;
    243 DOMAIN_BLOCK_STATS_FLAGS See figures::block_stats_flags;
    244 DOMAIN_SNAPSHOT_GET_PARENT See snapshots::parent;
    245 DOMAIN_RESET Change power::reset;
    246 DOMAIN_SNAPSHOT_NUM_CHILDREN See snapshots::count_children;
    247 DOMAIN_SNAPSHOT_LIST_CHILDREN_NAMES See snapshots::children_names;
    249 DOMAIN_OPEN_GRAPHICS Change graphics::open;
    251 DOMAIN_BLOCK_RESIZE Change devices::block_resize;
    252 DOMAIN_SET_BLOCK_IO_TUNE Change devices::set_block_tuning;
    253 DOMAIN_GET_BLOCK_IO_TUNE See devices::block_tuning;
    254 DOMAIN_SET_NUMA_PARAMETERS Change tuning::set_nodes;
    255 DOMAIN_GET_NUMA_PARAMETERS See tuning::nodes;
    256 DOMAIN_SET_INTERFACE_PARAMETERS Change devices::set_interface_tuning;
    257 DOMAIN_GET_INTERFACE_PARAMETERS See devices::interface_tuning;
    258 DOMAIN_SHUTDOWN_FLAGS Change power::shutdown_flags;
    259 STORAGE_VOL_WIPE_PATTERN Change volumes::wipe_pattern;
    260 STORAGE_VOL_RESIZE Change volumes::resize;
    261 DOMAIN_PM_SUSPEND_FOR_DURATION Change inside::suspend;
    262 DOMAIN_GET_CPU_STATS See figures::cpu_stats;
    263 DOMAIN_GET_DISK_ERRORS See figures::disk_errors;
    264 DOMAIN_SET_METADATA Change domain::set_metadata;
    265 DOMAIN_GET_METADATA See domain::metadata;
    266 DOMAIN_BLOCK_REBASE Change copies::rebase;
    267 DOMAIN_PM_WAKEUP Change figures::wake;
    271 DOMAIN_SNAPSHOT_IS_CURRENT See snapshots::is_current;
    272 DOMAIN_SNAPSHOT_HAS_METADATA See snapshots::has_metadata;
    273 CONNECT_LIST_ALL_DOMAINS See domain::list;
    274 DOMAIN_LIST_ALL_SNAPSHOTS See snapshots::list;
    275 DOMAIN_SNAPSHOT_LIST_ALL_CHILDREN See snapshots::children;
    277 DOMAIN_GET_HOSTNAME Inspect stats::hostname;
    279 DOMAIN_PIN_EMULATOR Change threads::pin_emulator;
    280 DOMAIN_GET_EMULATOR_PIN_INFO See threads::emulator_pin;
    281 CONNECT_LIST_ALL_STORAGE_POOLS See storage::list;
    282 STORAGE_POOL_LIST_ALL_VOLUMES See storage::volumes;
    283 CONNECT_LIST_ALL_NETWORKS See network::list;
    284 CONNECT_LIST_ALL_INTERFACES See nodedev::list_interfaces;
    285 CONNECT_LIST_ALL_NODE_DEVICES See nodedev::list;
    286 CONNECT_LIST_ALL_NWFILTERS See nwfilter::list;
    287 CONNECT_LIST_ALL_SECRETS See secret::list;
    288 NODE_SET_MEMORY_PARAMETERS Change host::set_memory_parameters;
    289 NODE_GET_MEMORY_PARAMETERS See host::memory_parameters;
    290 DOMAIN_BLOCK_COMMIT Change layers::commit;
    291 NETWORK_UPDATE Change network_update::update;
    293 NODE_GET_CPU_MAP See connect::cpu_map;
    294 DOMAIN_FSTRIM Change inside::trim;
    298 DOMAIN_GET_JOB_STATS See backup::job_stats;
    308 DOMAIN_SET_MEMORY_STATS_PERIOD Change stats::memory_period;
    312 CONNECT_GET_CPU_MODEL_NAMES See nodedev::cpu_models;
    313 CONNECT_NETWORK_EVENT_REGISTER_ANY See event::network_register;
    314 CONNECT_NETWORK_EVENT_DEREGISTER_ANY See event::network_deregister;
    316 CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY See event::callback_register;
    317 CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY See event::callback_deregister;
    334 DOMAIN_CORE_DUMP_WITH_FORMAT Change memory::dump_with_format;
    335 DOMAIN_FSFREEZE Change inside::freeze;
    336 DOMAIN_FSTHAW Change inside::thaw;
    337 DOMAIN_GET_TIME Change inside::time;
    338 DOMAIN_SET_TIME Change inside::set_time;
    340 NODE_GET_FREE_PAGES See host::free_pages;
    341 NETWORK_GET_DHCP_LEASES See network::leases;
    342 CONNECT_GET_DOMAIN_CAPABILITIES Inspect connect::domain_capabilities;
    343 DOMAIN_OPEN_GRAPHICS_FD Change graphics::open_fd;
    344 CONNECT_GET_ALL_DOMAIN_STATS See stats::all;
    345 DOMAIN_BLOCK_COPY Change copies::copy;
    349 DOMAIN_GET_FSINFO Change inside::fs_info;
    350 DOMAIN_DEFINE_XML_FLAGS Change define::define_flags;
    351 DOMAIN_GET_IOTHREAD_INFO See threads::iothreads;
    352 DOMAIN_PIN_IOTHREAD Change threads::pin_iothread;
    353 DOMAIN_INTERFACE_ADDRESSES See stats::addresses;
    355 DOMAIN_ADD_IOTHREAD Change threads::add_iothread;
    356 DOMAIN_DEL_IOTHREAD Change threads::delete_iothread;
    357 DOMAIN_SET_USER_PASSWORD Change inside::set_password;
    358 DOMAIN_RENAME Change power::rename;
    360 CONNECT_REGISTER_CLOSE_CALLBACK See connect::nothing;
    361 CONNECT_UNREGISTER_CLOSE_CALLBACK See connect::nothing;
    368 CONNECT_STORAGE_POOL_EVENT_REGISTER_ANY See event::pool_register;
    369 CONNECT_STORAGE_POOL_EVENT_DEREGISTER_ANY See event::pool_deregister;
    371 DOMAIN_GET_GUEST_VCPUS Change inside::vcpus;
    372 DOMAIN_SET_GUEST_VCPUS Change inside::set_vcpus;
    374 CONNECT_NODE_DEVICE_EVENT_REGISTER_ANY See plugged::register;
    375 CONNECT_NODE_DEVICE_EVENT_DEREGISTER_ANY See plugged::deregister;
    378 STORAGE_VOL_GET_INFO_FLAGS See storage::volume_info_flags;
    380 CONNECT_SECRET_EVENT_REGISTER_ANY See event::secret_register;
    381 CONNECT_SECRET_EVENT_DEREGISTER_ANY See event::secret_deregister;
    384 DOMAIN_SET_VCPU Change sizes::set_vcpu;
    386 DOMAIN_SET_BLOCK_THRESHOLD Change figures::set_threshold;
    388 DOMAIN_MANAGED_SAVE_GET_XML_DESC See machine::managed_save_xml;
    389 DOMAIN_MANAGED_SAVE_DEFINE_XML Change machine::managed_save_define;
    390 DOMAIN_SET_LIFECYCLE_ACTION Change power::set_lifecycle_action;
    391 STORAGE_POOL_LOOKUP_BY_TARGET_PATH See storage::by_target;
    392 DOMAIN_DETACH_DEVICE_ALIAS Change devices::detach_alias;
    393 CONNECT_COMPARE_HYPERVISOR_CPU Inspect cpu::compare_hypervisor;
    394 CONNECT_BASELINE_HYPERVISOR_CPU Inspect cpu::baseline_hypervisor;
    397 NWFILTER_BINDING_LOOKUP_BY_PORT_DEV See nwfilter::binding_by_port;
    398 NWFILTER_BINDING_GET_XML_DESC See nwfilter::binding_xml;
    399 NWFILTER_BINDING_CREATE_XML Change nwfilter::change_binding;
    400 NWFILTER_BINDING_DELETE Change nwfilter::change_binding;
    401 CONNECT_LIST_ALL_NWFILTER_BINDINGS See nwfilter::list_bindings;
    402 DOMAIN_SET_IOTHREAD_PARAMS Change threads::set_iothread;
    403 CONNECT_GET_STORAGE_POOL_CAPABILITIES See pools::capabilities;
    404 NETWORK_LIST_ALL_PORTS See networks::list_ports;
    405 NETWORK_PORT_LOOKUP_BY_UUID See networks::port_by_uuid;
    409 NETWORK_PORT_GET_XML_DESC See networks::port_xml;
    411 DOMAIN_CHECKPOINT_CREATE_XML Change checkpoints::create;
    412 DOMAIN_CHECKPOINT_GET_XML_DESC See checkpoints::xml;
    413 DOMAIN_LIST_ALL_CHECKPOINTS See checkpoints::list;
    414 DOMAIN_CHECKPOINT_LIST_ALL_CHILDREN See checkpoints::children;
    415 DOMAIN_CHECKPOINT_LOOKUP_BY_NAME See checkpoints::by_name;
    416 DOMAIN_CHECKPOINT_GET_PARENT See checkpoints::parent;
    417 DOMAIN_CHECKPOINT_DELETE Change checkpoints::delete;
    418 DOMAIN_GET_GUEST_INFO Change inside::info;
    420 DOMAIN_AGENT_SET_RESPONSE_TIMEOUT Change inside::set_timeout;
    421 DOMAIN_BACKUP_BEGIN Change backup::begin;
    422 DOMAIN_BACKUP_GET_XML_DESC See backup::xml;
    424 DOMAIN_AUTHORIZED_SSH_KEYS_GET Change inside::ssh_keys;
    425 DOMAIN_AUTHORIZED_SSH_KEYS_SET Change inside::set_ssh_keys;
    426 DOMAIN_GET_MESSAGES See domain::messages;
    427 DOMAIN_START_DIRTY_RATE_CALC Change monitor::measure;
    431 NWFILTER_DEFINE_XML_FLAGS Change nwfilter::define;
    432 NETWORK_DEFINE_XML_FLAGS Change networks::define_flags;
    433 NODE_DEVICE_GET_AUTOSTART Inspect nodedev::is_persistent;
    435 NODE_DEVICE_IS_PERSISTENT See nodedev::is_persistent;
    436 NODE_DEVICE_IS_ACTIVE See nodedev::is_active;
    437 NETWORK_CREATE_XML_FLAGS Change networks::create_xml_flags;
    440 DOMAIN_SAVE_PARAMS Change memory::save_params;
    441 DOMAIN_RESTORE_PARAMS Change memory::restore_params;
};

/// Those of the QEMU program, which go past libvirt's own words.
const OF_QEMU: &[Procedure] = procedures! {
    1 DOMAIN_MONITOR_COMMAND Change monitor::command;
    3 DOMAIN_AGENT_COMMAND Change inside::command;
    4 CONNECT_DOMAIN_MONITOR_EVENT_REGISTER Change monitor::register;
    5 CONNECT_DOMAIN_MONITOR_EVENT_DEREGISTER Inspect monitor::deregister;
};

/// The procedure of a program and a number.
pub fn find(program: u32, number: i32) -> Option<&'static Procedure> {
    let all = if program == QEMU { OF_QEMU } else { PROCEDURES };
    all.binary_search_by_key(&number, |p| p.number).ok().map(|n| &all[n])
}

/// The function behind a procedure, also of the QEMU program.
pub fn name_of(program: u32, number: i32) -> String {
    match find(program, number) {
        // Such as virDomainQemuAgentCommand.
        Some(procedure) if program == QEMU => {
            format!("vir{}", words(procedure.name).replacen("Domain", "DomainQemu", 1))
        }
        _ if program == QEMU => format!("QEMU procedure {number}"),
        _ => api_name(number),
    }
}

/// What there will be none of here, each with the reason; what is in neither table is not there yet.
const NEVER: &[(&[i32], &str)] = &[
    (
        &[131, 132, 133, 134, 220, 221, 222],
        "the interfaces of a host are configured by its own tools; Karst's bridges are networks",
    ),
    (
        &[123, 124, 428, 429, 430, 434],
        "no devices of the host are made: neither mediated ones nor virtual ports",
    ),
    (
        &[118, 119, 120, 301],
        "no PCI device of the host is handed to a machine; what drives them, and their reset, are its administrator's",
    ),
    (
        &[365, 366],
        "what the processors count of one guest tells about the others that they run; figures are in virDomainGetCPUStats \
         and the metrics",
    ),
    (&[250], "a host with guests is not put to sleep"),
    (
        &[347],
        "the huge pages of a host are set aside by its administrator, with vm.nr_hugepages: whatever else runs there lacks them",
    ),
    (&[395], "encrypted memory is not used here"),
    (
        &[406, 408, 410],
        "a port of a network belongs to the interface of its guest, and comes and goes with it",
    ),
    (&[443], "disks are volumes; no descriptor of a client is one"),
];

/// The function behind a procedure that nothing answers, with the reason where it is not merely missing.
pub fn why_not(program: u32, number: i32) -> String {
    let name = name_of(program, number);
    let never = NEVER.iter().filter(|_| program != QEMU).find(|(numbers, _)| numbers.contains(&number));
    never.map_or(name.clone(), |(_, why)| format!("{name}: {why}"))
}

impl Procedure {
    /// May it be called now?
    ///
    /// # Errors
    /// Internal before the connection is open; denied when it would change something through the read-only socket.
    pub fn admit(&self, session: &Session) -> Result<(), VirError> {
        if self.demand == Demand::Handshake {
            return Ok(());
        }
        let driver = session.opened()?.driver;
        if matches!(self.demand, Demand::Change | Demand::Inspect) && session.read_only() {
            let text = format!("read only access prevents vir{}", words(self.name));
            return Err(VirError::new(Code::OperationDenied, driver.part(), text));
        }
        Ok(())
    }
}

/// The function of libvirt's API behind a procedure, such as `virDomainGetXMLDesc`.
pub fn api_name(number: i32) -> String {
    let name = usize::try_from(number).ok().and_then(|n| NAMES.get(n.checked_sub(1)?));
    let Some(name) = name else { return format!("procedure {number}") };
    format!("vir{}", words(name))
}

/// A procedure's name as a function's.
fn words(name: &str) -> String {
    let words = name.split('_').map(|word| match word {
        "XML" | "UUID" | "ID" | "OS" | "CPU" | "URI" | "MAC" | "NMI" | "DHCP" | "SEV" | "WWN" | "SSH" => {
            word.to_owned()
        }
        "NWFILTER" => "NWFilter".to_owned(),
        "FSINFO" => "FSInfo".to_owned(),
        "IOTHREAD" => "IOThread".to_owned(),
        word => word[..1].to_owned() + &word[1..].to_ascii_lowercase(),
    });
    words.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_order_and_of_the_protocol() {
        assert!(PROCEDURES.windows(2).all(|w| w[0].number < w[1].number));
        for p in PROCEDURES {
            assert_eq!(NAMES[p.number as usize - 1], p.name);
        }
        assert_eq!(NAMES.len(), 443);
    }

    #[test]
    fn what_is_never_there_says_why_and_is_not_there() {
        for (numbers, _) in NEVER {
            for number in *numbers {
                assert!(find(crate::frame::REMOTE, *number).is_none(), "{number}");
                assert!(why_not(crate::frame::REMOTE, *number).contains(": "));
            }
        }
        assert!(why_not(crate::frame::REMOTE, 131).starts_with("virInterfaceDefineXML: the interfaces"));
        assert_eq!(why_not(QEMU, 2), "QEMU procedure 2");
        assert_eq!(why_not(crate::frame::REMOTE, 295), "virDomainSendProcessSignal");
    }

    #[test]
    fn names_of_the_api() {
        assert_eq!(api_name(14), "virDomainGetXMLDesc");
        assert_eq!(api_name(12), "virDomainDestroy");
        assert_eq!(api_name(0), "procedure 0");
        assert_eq!(api_name(-5), "procedure -5");
        assert_eq!(name_of(QEMU, 3), "virDomainQemuAgentCommand");
        assert_eq!(name_of(QEMU, 4), "virConnectDomainQemuMonitorEventRegister");
        assert_eq!(api_name(9999), "procedure 9999");
    }
}
